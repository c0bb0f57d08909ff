/* Which jobs the pool shares, what its workers do, and what stack a step needs.  tests/test_threads.py builds this with csrc/
 * and runs it on Linux with at least two CPUs.  Prints what does not hold, and nothing where all is well. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "internal.h"

enum { SMALL = 32 * 1024, LARGE = 320 * 1024, COUNT = 64 };

static _Atomic int pieces;

static void task(void *context, int64_t begin, int64_t end)
{
    (void)context;
    atomic_fetch_add(&pieces, begin != 0 || end != COUNT);
}

/* run a job, and answer whether it was shared */
static int is_shared(int64_t elements)
{
    atomic_store(&pieces, 0);
    fastrms_enter_step();
    fastrms_parallel(elements, task, NULL, COUNT, 1);
    fastrms_leave_step();
    return pieces > 0;
}

static int shared_of(int jobs)
{
    int count = 0;
    for (int k = 0; k < jobs; ++k)
        count += is_shared(SMALL);
    return count;
}

static void expect(int fine, const char *what)
{
    if (!fine)
        printf("%s\n", what);
}

static void a_step_of_two_jobs_is_no_loop(void)
{
    int count = 0;
    for (int k = 0; k < 20; ++k) {
        usleep(1000);
        count += shared_of(4);
    }
    expect(count == 0, "small jobs, four at a time, woke workers");
    for (count = 0; count < 50 && !shared_of(100); ++count)      /* on a busy machine, a loop may have gaps */
        usleep(1000);
    expect(count < 50, "a loop of small jobs was not shared");
}

/* the task of this process with this number in /proc: how often it went to sleep, and the CPUs it may use */
static void look(const char *number, long *sleeps, cpu_set_t *cpus)
{
    char path[300], line[300];
    snprintf(path, sizeof path, "/proc/self/task/%s/status", number);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        sscanf(line, "voluntary_ctxt_switches: %ld", sleeps);
    if (file)
        fclose(file);
    sched_getaffinity(atoi(number), sizeof *cpus, cpus);
}

/* fill in the sleeps of all workers; answers how many there are */
static int look_at_workers(long *sleeps, cpu_set_t *cpus)
{
    int count = 0;
    DIR *folder = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(folder));)
        if (entry->d_name[0] != '.' && atoi(entry->d_name) != getpid() && atoi(entry->d_name) != syscall(SYS_gettid) && count < 64) {
            look(entry->d_name, &sleeps[count], &cpus[count]);
            ++count;
        }
    closedir(folder);
    return count;
}

/* how many workers some jobs wake, some time apart */
static int woken_by(int jobs)
{
    long before[64] = {0}, after[64] = {0};
    static cpu_set_t cpus[64];
    int woken = 0, count = look_at_workers(before, cpus);
    expect(count == 5, "there are not five workers");
    for (int k = 0; k < jobs; ++k) {
        is_shared(LARGE);
        usleep(2000);
    }
    look_at_workers(after, cpus);
    for (int k = 0; k < count; ++k)
        woken += after[k] != before[k];
    return woken;
}

/* Each is tried again, since on a busy machine a worker is late. */
static void workers_without_a_part_sleep(void)
{
    int tries;
    fastrms_set_num_threads(6);
    is_shared(LARGE);
    fastrms_set_num_threads(2);
    for (tries = 0; tries < 50 && woken_by(10) > 1; ++tries)
        ;
    expect(tries < 50, "jobs of two threads wake more than one worker");
    fastrms_set_num_threads(6);
    for (tries = 0; tries < 50 && woken_by(10) < 5; ++tries)
        ;
    expect(tries < 50, "jobs of six threads do not wake five workers");
    fastrms_set_num_threads(2);
}

static void a_caller_with_one_cpu_shares_no_small_jobs(void)
{
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    usleep(1000);
    expect(shared_of(1000) == 0, "small jobs of a caller with one CPU were shared");
    sched_setaffinity(0, sizeof all, &all);
}

static _Atomic int masked;

/* in place of that of the system: it counts its calls */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *before)
{
    atomic_fetch_add(&masked, 1);
    return sigprocmask(how, set, before);
}

static void a_shared_job_makes_no_system_call_for_workers_that_are_there(void)
{
    usleep(1000);
    is_shared(LARGE);
    expect(masked > 0, "the calls that mask signals are not counted");
    masked = 0;
    expect(shared_of(100) > 0, "a loop that follows on a large job was not shared");
    expect(masked == 0, "a job masked signals, although its workers were there");
}

/* in a thread of its own, limited to one CPU, in a process whose first thread is limited to another */
static void *workers_stay_on_the_cpus_of_the_caller(void *cpu)
{
    long sleeps[64] = {0};
    static cpu_set_t one, cpus[64];
    CPU_SET((size_t)(intptr_t)cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    fastrms_set_num_threads(3);
    for (int k = 0; k < 50; ++k) {
        is_shared(LARGE);
        usleep(200);
    }
    int count = look_at_workers(sleeps, cpus), inside = 0;
    for (int k = 0; k < count; ++k)
        inside += CPU_EQUAL(&cpus[k], &one);
    expect(count == 2 && inside == 2, "a worker left the CPUs of its caller");
    return NULL;
}

static void *make_first_steps(void *nothing)
{
    static double buffer[4][64];
    fastrms_recipe recipe;
    for (int itemsize = 4; itemsize <= 8; itemsize += 4) {
        fastrms_adam_recipe(&recipe, itemsize, &fastrms_adam_defaults);
        fastrms_update(&recipe, 64, 1, 1, buffer[0], buffer[1], buffer[2], buffer[3], NULL);
    }
    return nothing;
}

/* it crashes where the stack does not suffice */
static void a_first_step_needs_little_stack(void)
{
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 28 * 1024);
    pthread_create(&thread, &small, make_first_steps, NULL);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&small);
}

int main(int count, char **arguments)
{
    cpu_set_t all, one;
    pthread_t thread;
    sched_getaffinity(0, sizeof all, &all);
    int cpu[2], found = 0;
    for (int k = 0; k < CPU_SETSIZE && found < 2; ++k)
        if (CPU_ISSET(k, &all))
            cpu[found++] = k;
    if (found < 2)
        return 77;
    fastrms_set_num_threads(2);
    (void)arguments;
    if (count > 1) {
        CPU_ZERO(&one);
        CPU_SET(cpu[1], &one);
        pthread_create(&thread, NULL, workers_stay_on_the_cpus_of_the_caller, (void *)(intptr_t)cpu[0]);
        sched_setaffinity(0, sizeof one, &one);
        pthread_join(thread, NULL);
        return 0;
    }
    a_first_step_needs_little_stack();
    a_step_of_two_jobs_is_no_loop();
    workers_without_a_part_sleep();
    a_caller_with_one_cpu_shares_no_small_jobs();
    a_shared_job_makes_no_system_call_for_workers_that_are_there();
    return 0;
}
