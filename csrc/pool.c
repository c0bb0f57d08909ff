/* The worker pool: a job is a range of numbers, cut into one contiguous slice per thread, the same at every step, so
 * that a thread meets the memory it touched first; a thread that is done takes chunks of the others' slices.
 *
 * The caller works too and waits only for chunks that a worker holds.  A second caller at the same time runs its job
 * alone.  Workers sleep between jobs and block all signals.  Around fork() no step is under way and no worker alive: the
 * child finds every optimizer whole and starts workers of its own when it needs them. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include "internal.h"

enum { MOST_THREADS = 64, STACK = 256 * 1024, PAUSES = 500 };

typedef struct {
    _Atomic int64_t next;
    int64_t end;
    char apart[48];                                       /* one cache line each */
} slice;

static struct {
    pthread_mutex_t submit;                               /* held during a job; whoever finds it taken runs alone */
    pthread_mutex_t lock;                                 /* guards what follows up to `inside` */
    pthread_cond_t wake, done;
    pthread_t worker[MOST_THREADS];
    int workers, parties, stop;
    unsigned epoch;                                       /* number of the job; a worker sleeps until it changes */
    _Atomic int inside;                                   /* workers that may hold a chunk of the job */
    fastrms_task *task;
    void *context;
    int64_t chunk;
    slice slices[MOST_THREADS];
} pool = {.submit = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static _Atomic int threads = 1;
static _Atomic int64_t chunk_size = 16 * 1024, threshold = 128 * 1024;

static void breathe(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* chunks of the own slice first, then of the others', in turn */
static void work(int self, int parties, int64_t chunk, fastrms_task *task, void *context)
{
    for (int k = 0; k < parties; ++k) {
        slice *from = &pool.slices[(self + k) % parties];
        int64_t end = from->end, begin;
        while ((begin = atomic_fetch_add_explicit(&from->next, chunk, memory_order_relaxed)) < end)
            task(context, begin, begin + chunk < end ? begin + chunk : end);
    }
}

static void *worker(void *argument)
{
    int self = (int)(intptr_t)argument;
    pthread_mutex_lock(&pool.lock);
    for (unsigned seen = pool.epoch - 1;;) {
        while (pool.epoch == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        seen = pool.epoch;
        if (pool.stop)
            break;
        if (self >= pool.parties)
            continue;                                     /* late, or not asked: parties is 0 after a job */
        int parties = pool.parties;
        int64_t chunk = pool.chunk;
        fastrms_task *task = pool.task;
        void *context = pool.context;
        atomic_fetch_add(&pool.inside, 1);
        pthread_mutex_unlock(&pool.lock);
        work(self, parties, chunk, task, context);
        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.inside, 1) == 1)
            pthread_cond_signal(&pool.done);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* have that many workers, or as many as the system gives */
static int hire(int wanted)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before);          /* Python's signals stay on Python's threads */
    while (pool.workers < wanted) {
        void *self = (void *)(intptr_t)(pool.workers + 1);
        if (pthread_create(&pool.worker[pool.workers], &attributes, worker, self))
            break;
        ++pool.workers;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return pool.workers < wanted ? pool.workers : wanted;
}

static void start(int parties, fastrms_task *task, void *context, int64_t count, int64_t chunk)
{
    pthread_mutex_lock(&pool.lock);
    for (int k = 0; k < parties; ++k) {
        atomic_store_explicit(&pool.slices[k].next, count * k / parties, memory_order_relaxed);
        pool.slices[k].end = count * (k + 1) / parties;
    }
    pool.parties = parties;
    pool.task = task;
    pool.context = context;
    pool.chunk = chunk;
    ++pool.epoch;
    pthread_mutex_unlock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
}

static void finish(void)
{
    for (int k = 0; k < PAUSES && atomic_load_explicit(&pool.inside, memory_order_acquire); ++k)
        breathe();
    pthread_mutex_lock(&pool.lock);
    pool.parties = 0;
    while (atomic_load(&pool.inside))
        pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

void fastrms_parallel(int64_t elements, fastrms_task *task, void *context, int64_t count, int64_t chunk)
{
    int wanted = atomic_load_explicit(&threads, memory_order_relaxed);
    if (wanted > 1 && elements >= atomic_load_explicit(&threshold, memory_order_relaxed) && count > chunk
        && pthread_mutex_trylock(&pool.submit) == 0) {
        int parties = 1 + hire(wanted - 1);
        start(parties, task, context, count, chunk);
        work(0, parties, chunk, task, context);
        finish();
        pthread_mutex_unlock(&pool.submit);
    } else {
        task(context, 0, count);
    }
}

int64_t fastrms_chunk_size(void) { return atomic_load_explicit(&chunk_size, memory_order_relaxed); }

void fastrms_set_chunks(int64_t chunk, int64_t least_elements)
{
    atomic_store(&chunk_size, chunk < 1 ? 1 : chunk);
    atomic_store(&threshold, least_elements);
}

FASTRMS_VISIBLE int fastrms_get_num_threads(void) { return atomic_load(&threads); }

FASTRMS_VISIBLE void fastrms_set_num_threads(int count)
{
    atomic_store(&threads, count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count);
}

int fastrms_workers(void)
{
    pthread_mutex_lock(&pool.lock);
    int workers = pool.workers;
    pthread_mutex_unlock(&pool.lock);
    return workers;
}

/* fork(): steps in progress are waited for, new ones wait */

static _Atomic int stepping, forking;
static _Atomic int32_t generation = 1;

int32_t fastrms_generation(void) { return atomic_load_explicit(&generation, memory_order_relaxed); }

void fastrms_enter_step(void)
{
    while (atomic_fetch_add(&stepping, 1), atomic_load(&forking)) {
        atomic_fetch_sub(&stepping, 1);
        while (atomic_load(&forking))
            sched_yield();
    }
}

void fastrms_leave_step(void) { atomic_fetch_sub_explicit(&stepping, 1, memory_order_release); }

static void before_fork(void)
{
    while (atomic_exchange(&forking, 1))                  /* another thread forks */
        sched_yield();
    while (atomic_load(&stepping))
        sched_yield();
    pthread_mutex_lock(&pool.lock);
    pool.stop = 1;
    ++pool.epoch;
    pthread_mutex_unlock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    for (int k = 0; k < pool.workers; ++k)
        pthread_join(pool.worker[k], NULL);
    pool.workers = pool.stop = 0;
}

static void after_fork_in_parent(void) { atomic_store(&forking, 0); }

static void after_fork_in_child(void)
{
    pthread_mutex_init(&pool.submit, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_fetch_add(&generation, 1);                     /* a plan that was busy in the parent is not busy here */
    atomic_store(&forking, 0);
}

__attribute__((constructor)) static void prepare_for_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}
