/* The threads of a warp as coroutines: each runs until it exchanges a register, and goes on when all have come so far.  An
 * exchange in which a thread of the warp is missing is an error; PTX does not define what it gives. */
#include <ucontext.h>

enum { WARP = 32, STACK = 1 << 16 };
static struct { ucontext_t at; u32 given, with, got; int waits, done; } lanes[WARP];
static char stacks[WARP][STACK];
static ucontext_t scheduler;
static int running;
static struct { memory *m; const u64 *P; u32 tid, ntid, cta, ncta; } warp;

static u32 exchanged(u32 x, u32 with)
{
    int me = running;
    lanes[me].given = x, lanes[me].with = with, lanes[me].waits = 1;
    swapcontext(&lanes[me].at, &scheduler);
    return lanes[me].got;
}

static void lane(void)
{
    thread(warp.m, warp.P, warp.tid + (u32)running, warp.ntid, warp.cta, warp.ncta);
    lanes[running].done = 1;
    swapcontext(&lanes[running].at, &scheduler);
}

static void run_warp(memory *m, const u64 *P, u32 tid, u32 ntid, u32 cta, u32 ncta, int backwards)
{
    warp.m = m, warp.P = P, warp.tid = tid, warp.ntid = ntid, warp.cta = cta, warp.ncta = ncta;
    for (int k = 0; k < WARP; k++) {
        getcontext(&lanes[k].at);
        lanes[k].at.uc_stack.ss_sp = stacks[k], lanes[k].at.uc_stack.ss_size = STACK;
        lanes[k].done = 0;
        makecontext(&lanes[k].at, lane, 0);
    }
    for (int waiting = WARP; waiting && !m->error;) {
        int done = waiting = 0;
        for (int j = 0; j < WARP; j++) {
            int k = running = backwards ? WARP - 1 - j : j;
            lanes[k].waits = 0;
            if (!lanes[k].done)
                swapcontext(&scheduler, &lanes[k].at);
            waiting += lanes[k].waits, done += lanes[k].done;
        }
        if (waiting && done)
            m->error = DIVERGED;
        for (int k = 0; k < WARP; k++)
            lanes[k].got = lanes[k ^ (lanes[k].with & 31)].given;
    }
}
