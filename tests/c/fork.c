/* A thread that comes to a step during a fork counts itself before it sees that it must wait.  It is caught there: the child,
 * which has not that thread, must be able to fork, too.  tests/test_threads.py builds this with csrc/, in which this file takes
 * the place of pool.c. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

static _Atomic int has_come, may_go_on;

/* the thread that counted itself in vain is about to undo it */
static void before_undoing(void)
{
    atomic_store(&has_come, 1);
    while (!atomic_load(&may_go_on))
        usleep(100);
}

#undef atomic_fetch_sub
#define atomic_fetch_sub(counter, one) (before_undoing(), atomic_fetch_sub_explicit(counter, one, memory_order_seq_cst))
#include <pool.c>

static void *step(void *nothing)
{
    fastrms_enter_step();
    fastrms_leave_step();
    return nothing;
}

static pthread_t late;

static void let_a_thread_come(void)
{
    if (has_come)
        return;
    pthread_create(&late, NULL, step, NULL);
    while (!atomic_load(&has_come))
        usleep(100);
}

/* registered before the handler of pool.c, and so called after it */
__attribute__((constructor(101))) static void be_last(void) { pthread_atfork(let_a_thread_come, NULL, NULL); }

static int fork_and_wait(int again)
{
    int status;
    pid_t child = fork();
    if (!child) {
        alarm(10);
        _exit(again ? fork_and_wait(0) : 0);
    }
    waitpid(child, &status, 0);
    return status != 0;
}

int main(void)
{
    int failed = fork_and_wait(1);
    atomic_store(&may_go_on, 1);
    pthread_join(late, NULL);
    printf(failed ? "the child could not fork\n" : "fine\n");
    return failed;
}
