/* Many callers, many threads, forks in between: every element is updated exactly once per step, in parent and child.
 * tests/test_threads.py builds this with csrc/ under ThreadSanitizer and AddressSanitizer.  Arguments: callers, forks. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "fastrms.h"
#include "testing_decl.h"

enum { TENSORS = 5, STEPS = 60 };
static const int64_t SIZES[TENSORS] = {70001, 1, 0, 3, 30007};

typedef struct {
    fastrms_plan plan;
    fastrms_tensor tensor[TENSORS];
    fastrms_recipe recipe;
    const void *grad[TENSORS];
    void *scratch;
    float *memory[TENSORS][3];
} problem;

static int rule_index(const char *name)
{
    for (int k = 0; k < fastrms_rule_count(); ++k)
        if (!strcmp(fastrms_rule_name(k), name))
            return k;
    abort();
}

/* AdaGrad with a gradient of 1: after t steps every sum is t */
static problem *make(void)
{
    problem *p = calloc(1, sizeof *p);
    p->recipe.rule = rule_index("adagrad");
    p->recipe.itemsize = 4;
    p->recipe.coefficients = 11;
    p->recipe.value[0] = p->recipe.value[1] = p->recipe.value[6] = p->recipe.value[7] = 1;
    for (int k = 0; k < TENSORS; ++k) {
        for (int b = 0; b < 3; ++b)
            p->memory[k][b] = calloc((size_t)SIZES[k] + 1, sizeof(float));
        for (int64_t i = 0; i < SIZES[k]; ++i)
            p->memory[k][1][i] = 1;
        p->tensor[k] = (fastrms_tensor){.size = SIZES[k], .param = p->memory[k][0], .state = {p->memory[k][2]}};
        p->grad[k] = p->memory[k][1];
    }
    p->scratch = malloc((size_t)fastrms_scratch_bytes(TENSORS, p->tensor));
    fastrms_plan_init(&p->plan, TENSORS, p->tensor, 1, &p->recipe, p->grad, p->scratch);
    p->plan.clip_norm = 1e30;
    p->plan.held = 1;
    return p;
}

static long faults(const problem *p, int steps)
{
    long bad = p->plan.steps != steps;
    for (int k = 0; k < TENSORS; ++k) {
        bad += p->tensor[k].steps != steps;
        for (int64_t i = 0; i < SIZES[k]; ++i)
            bad += p->memory[k][2][i] != (float)steps;
    }
    return bad;
}

static void drop(problem *p)
{
    for (int k = 0; k < TENSORS; ++k)
        for (int b = 0; b < 3; ++b)
            free(p->memory[k][b]);
    free(p->scratch);
    free(p);
}

static void step(problem *p, int steps)
{
    for (int t = 0; t < steps; ++t)
        if (fastrms_step(&p->plan))
            abort();
}

static void *caller(void *argument)
{
    step(argument, STEPS);
    return NULL;
}

/* what a child does: its exit status */
static int child(void)
{
    alarm(30);
    problem *p = make();
    step(p, 3);
    return faults(p, 3) || fastrms_workers() < 1;
}

int main(int count, char **arguments)
{
    int callers = count > 1 ? atoi(arguments[1]) : 3, forks = count > 2 ? atoi(arguments[2]) : 0;
    long bad = 0;
    pthread_t thread[64];
    problem *made[64];
    alarm(120);
    fastrms_set_num_threads(3);
    fastrms_set_chunks(1000, 1);
    for (int k = 0; k < callers; ++k)                     /* no thread allocates while another forks: a child of a */
        made[k] = make();                                 /* program under a sanitizer may find the allocator locked */
    for (int k = 0; k < callers; ++k)
        pthread_create(&thread[k], NULL, caller, made[k]);
    for (int f = 0; f < forks; ++f) {
        pid_t pid = fork();
        if (!pid)
            _exit(child());
        int status;
        waitpid(pid, &status, 0);
        bad += status != 0;
    }
    for (int k = 0; k < callers; ++k) {
        pthread_join(thread[k], NULL);
        bad += faults(made[k], STEPS);
        drop(made[k]);
    }
    printf("faults %ld, callers %d, forks %d, workers %d\n", bad, callers, forks, fastrms_workers());
    return bad != 0;
}
