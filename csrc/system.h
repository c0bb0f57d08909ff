/* What differs between systems: threads, locks, the clock, the CPUs of a thread, and fork().  The first header of a file that
 * includes it. */
#ifndef FASTRMS_SYSTEM_H
#define FASTRMS_SYSTEM_H
#ifdef __linux__
#define _GNU_SOURCE                                       /* sched_getcpu and sched_setaffinity */
#endif
#include <stddef.h>
#include <stdint.h>

enum { STACK = 256 * 1024 };                              /* bytes, of a thread that start_thread starts */

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

typedef SRWLOCK mutex;
typedef CONDITION_VARIABLE condition;
typedef HANDLE thread;
#define MUTEX SRWLOCK_INIT
#define CONDITION CONDITION_VARIABLE_INIT
#define FASTRMS_VISIBLE __declspec(dllexport)
#define THREAD_FUNCTION DWORD WINAPI
typedef DWORD WINAPI thread_function(void *argument);

static inline int try_lock(mutex *of) { return TryAcquireSRWLockExclusive(of); }
static inline void lock(mutex *of) { AcquireSRWLockExclusive(of); }
static inline void unlock(mutex *of) { ReleaseSRWLockExclusive(of); }
static inline void sleep_until(condition *changes, mutex *held) { SleepConditionVariableSRW(changes, held, INFINITE, 0); }
static inline void wake_one(condition *who) { WakeConditionVariable(who); }
static inline void wake_all(condition *who) { WakeAllConditionVariable(who); }
static inline void let_others_run(void) { SwitchToThread(); }

static inline int start_thread(thread *made, thread_function *run, void *argument)
{
    *made = CreateThread(NULL, STACK, run, argument, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return *made != NULL;
}

static inline void join_thread(thread which)
{
    WaitForSingleObject(which, INFINITE);
    CloseHandle(which);
}

static inline int64_t nanoseconds(void)
{
    LARGE_INTEGER now, second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&second);
    int64_t part = now.QuadPart % second.QuadPart;
    return now.QuadPart / second.QuadPart * INT64_C(1000000000) + part * INT64_C(1000000000) / second.QuadPart;
}

static inline void renew_mutex(mutex *of) { InitializeSRWLock(of); }
static inline void renew_condition(condition *who) { InitializeConditionVariable(who); }
static inline void around_forks(void (*before)(void), void (*in_parent)(void), void (*in_child)(void))
{
    (void)before, (void)in_parent, (void)in_child;        /* there is no fork */
}
#else
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

typedef pthread_mutex_t mutex;
typedef pthread_cond_t condition;
typedef pthread_t thread;
#define MUTEX PTHREAD_MUTEX_INITIALIZER
#define CONDITION PTHREAD_COND_INITIALIZER
#define FASTRMS_VISIBLE __attribute__((visibility("default")))
#define THREAD_FUNCTION void *
typedef void *thread_function(void *argument);

static inline int try_lock(mutex *of) { return pthread_mutex_trylock(of) == 0; }
static inline void lock(mutex *of) { pthread_mutex_lock(of); }
static inline void unlock(mutex *of) { pthread_mutex_unlock(of); }
static inline void sleep_until(condition *changes, mutex *held) { pthread_cond_wait(changes, held); }
static inline void wake_one(condition *who) { pthread_cond_signal(who); }
static inline void wake_all(condition *who) { pthread_cond_broadcast(who); }
static inline void let_others_run(void) { sched_yield(); }

/* The thread blocks all signals: Python's stay on Python's threads.  The answer is 0 where the system gives no thread. */
static inline int start_thread(thread *made, thread_function *run, void *argument)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(made, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error == 0;
}

static inline void join_thread(thread which) { pthread_join(which, NULL); }

static inline int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static inline void renew_mutex(mutex *of) { pthread_mutex_init(of, NULL); }
static inline void renew_condition(condition *who) { pthread_cond_init(who, NULL); }
static inline void around_forks(void (*before)(void), void (*in_parent)(void), void (*in_child)(void))
{
    pthread_atfork(before, in_parent, in_child);
}
#endif

/* this_cpu: the CPU that the calling thread runs on.  Where nobody says it, the answer is always the same: then every worker
 *     seems to share the CPU of the caller, and none waits awake.
 * number_of_thread: the number that leave_cpu takes for the calling thread; it is a system call.
 * is_confined: has the calling thread a single CPU?  Workers share it then, or soon will.
 * leave_cpu: Linux in a virtual machine takes an idle CPU for a busy one and wakes a worker on the CPU of its caller, where it
 *     can only take turns with it.  The worker moves to the others of those CPUs that the caller may use. */
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

static inline int this_cpu(void) { return sched_getcpu(); }
static inline int number_of_thread(void) { return (int)syscall(SYS_gettid); }

static inline int is_confined(void)
{
    cpu_set_t cpus;
    return !sched_getaffinity(0, sizeof cpus, &cpus) && CPU_COUNT(&cpus) == 1;
}

static inline void leave_cpu(int cpu, int caller)
{
    cpu_set_t others;
    if (cpu < 0 || sched_getaffinity(caller, sizeof others, &others))
        return;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others))
        sched_setaffinity(0, sizeof others, &others);
}
#else
static inline int number_of_thread(void) { return 1; }
static inline void leave_cpu(int cpu, int caller) { (void)cpu, (void)caller; }
#ifdef _WIN32
static inline int this_cpu(void) { return (int)GetCurrentProcessorNumber(); }

static inline int is_confined(void)
{
    DWORD_PTR ours, all;                                  /* bits; none where the process has CPUs of several groups */
    return GetProcessAffinityMask(GetCurrentProcess(), &ours, &all) && ours && !(ours & (ours - 1));
}
#else
static inline int this_cpu(void) { return 0; }
static inline int is_confined(void) { return 0; }
#endif
#endif

static inline void spin_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
#endif
