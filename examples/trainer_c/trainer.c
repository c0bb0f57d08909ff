/* A whole training program in C: a 64-32-10 network on scikit-learn's handwritten digits, by AdamW through fastrms.h.
 *
 *     trainer digits.csv weights.bin [steps.bin]
 *
 * prints loss and accuracy, and writes the final weights.  steps.bin gets the first weights and the gradients of every step,
 * from which same.py makes the same steps in Python. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fastrms.h"

enum { PIXELS = 64, HIDDEN = 32, DIGITS = 10, MOST_IMAGES = 2000, BATCH = 32, EPOCHS = 20, TENSORS = 4 };

typedef struct {
    float inner[HIDDEN][PIXELS], outer[DIGITS][HIDDEN], inner_bias[HIDDEN], outer_bias[DIGITS];
} network;

typedef struct {
    float pixel[PIXELS];
    int digit;
} image;

static image images[MOST_IMAGES];
static network weights, gradient, exp_avg, exp_avg_sq;

static void refuse(const char *what, const char *name)
{
    fprintf(stderr, "trainer: %s: %s\n", what, name);
    exit(1);
}

static FILE *opened(const char *path, const char *mode)
{
    FILE *file = fopen(path, mode);
    if (!file)
        refuse("cannot open", path);
    return file;
}

static int read_images(const char *path)
{
    FILE *file = opened(path, "r");
    int count = 0;
    while (count < MOST_IMAGES && fscanf(file, "%d", &images[count].digit) == 1) {
        for (int k = 0; k < PIXELS; ++k) {
            if (fscanf(file, ",%f", &images[count].pixel[k]) != 1)
                refuse("a line is not a digit and 64 pixels", path);
            images[count].pixel[k] /= 16;
        }
        if (images[count].digit < 0 || images[count].digit >= DIGITS)
            refuse("a line is not a digit and 64 pixels", path);
        ++count;
    }
    fclose(file);
    return count;
}

static void write_floats(FILE *file, const network *values)
{
    if (fwrite(values, sizeof *values, 1, file) != 1)
        refuse("cannot write", "weights or gradients");
}

/* random numbers, the same on every machine (xorshift64*) */
static uint32_t random_bits(void)
{
    static uint64_t state = 0x9e3779b97f4a7c15u;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1du) >> 32);
}

static void start_randomly(float *values, int count, float most)
{
    for (int k = 0; k < count; ++k)
        values[k] = most * ((float)random_bits() / 2147483648.0f - 1);
}

/* hidden activities and the probability of each digit */
static void forward(const image *x, float *hidden, float *probability)
{
    float most = -INFINITY, sum = 0;
    for (int h = 0; h < HIDDEN; ++h) {
        hidden[h] = weights.inner_bias[h];
        for (int k = 0; k < PIXELS; ++k)
            hidden[h] += weights.inner[h][k] * x->pixel[k];
        hidden[h] = hidden[h] > 0 ? hidden[h] : 0;
    }
    for (int d = 0; d < DIGITS; ++d) {
        probability[d] = weights.outer_bias[d];
        for (int h = 0; h < HIDDEN; ++h)
            probability[d] += weights.outer[d][h] * hidden[h];
        most = fmaxf(most, probability[d]);
    }
    for (int d = 0; d < DIGITS; ++d)
        sum += probability[d] = expf(probability[d] - most);
    for (int d = 0; d < DIGITS; ++d)
        probability[d] /= sum;
}

/* add the gradient of the cross-entropy of one image; returns that cross-entropy */
static float add_gradient(const image *x)
{
    float hidden[HIDDEN], probability[DIGITS], back[HIDDEN] = {0};
    forward(x, hidden, probability);
    for (int d = 0; d < DIGITS; ++d) {
        float error = probability[d] - (d == x->digit);
        gradient.outer_bias[d] += error;
        for (int h = 0; h < HIDDEN; ++h) {
            gradient.outer[d][h] += error * hidden[h];
            back[h] += error * weights.outer[d][h];
        }
    }
    for (int h = 0; h < HIDDEN; ++h)
        if (hidden[h] > 0) {
            gradient.inner_bias[h] += back[h];
            for (int k = 0; k < PIXELS; ++k)
                gradient.inner[h][k] += back[h] * x->pixel[k];
        }
    return -logf(fmaxf(probability[x->digit], 1e-30f));
}

/* AdamW: recipe 0 for the weights, recipe 1, without decay, for the biases */
static void make_recipes(fastrms_recipe *recipe)
{
    fastrms_hyper hyper = fastrms_adamw_defaults;
    hyper.lr = 3e-3;
    const char *refused = fastrms_adam_recipe(&recipe[0], sizeof(float), &hyper);
    hyper.weight_decay = 0;
    if (!refused)
        refused = fastrms_adam_recipe(&recipe[1], sizeof(float), &hyper);
    if (refused)
        refuse("this hyper-parameter is refused", refused);
}

#define TENSOR(name, number) {.size = sizeof weights.name / sizeof(float), .recipe = number, .param = weights.name, \
                              .state = {exp_avg.name, exp_avg_sq.name}}

/* All memory is the caller's; it lives as long as the program.  Each batch is one fastrms_step. */
static fastrms_plan *make_plan(void)
{
    static fastrms_tensor tensor[TENSORS] = {TENSOR(inner, 0), TENSOR(outer, 0), TENSOR(inner_bias, 1), TENSOR(outer_bias, 1)};
    static const void *grad[TENSORS] = {gradient.inner, gradient.outer, gradient.inner_bias, gradient.outer_bias};
    static fastrms_recipe recipe[2];
    static fastrms_plan plan;
    void *scratch = malloc((size_t)fastrms_scratch_bytes(TENSORS, tensor));
    if (!scratch)
        refuse("out of memory", "fastrms_scratch_bytes");
    make_recipes(recipe);
    fastrms_plan_init(&plan, TENSORS, tensor, 2, recipe, grad, scratch);
    plan.grad_scale = 1.0 / BATCH;
    plan.clip_norm = 1;
    plan.held = 1;
    return &plan;
}

static float train_epoch(fastrms_plan *plan, int count, FILE *steps)
{
    float loss = 0;
    for (int batch = 0; batch < count / BATCH; ++batch) {
        memset(&gradient, 0, sizeof gradient);
        for (int k = 0; k < BATCH; ++k)
            loss += add_gradient(&images[random_bits() % (uint32_t)count]);
        if (steps)
            write_floats(steps, &gradient);
        if (fastrms_step(plan) != FASTRMS_OK)
            refuse("a step was refused", "fastrms_step");
    }
    return loss / (float)(count / BATCH * BATCH);
}

static float accuracy(const image *first, int count)
{
    int right = 0;
    for (int k = 0; k < count; ++k) {
        float hidden[HIDDEN], probability[DIGITS];
        int best = 0;
        forward(&first[k], hidden, probability);
        for (int d = 1; d < DIGITS; ++d)
            best = probability[d] > probability[best] ? d : best;
        right += best == first[k].digit;
    }
    return (float)right / (float)count;
}

static void train(int count, const image *held_out, int held_out_count, FILE *steps)
{
    fastrms_plan *plan = make_plan();
    start_randomly(&weights.inner[0][0], HIDDEN * PIXELS, 0.2f);
    start_randomly(&weights.outer[0][0], DIGITS * HIDDEN, 0.3f);
    if (steps)
        write_floats(steps, &weights);
    for (int epoch = 1; epoch <= EPOCHS; ++epoch) {
        float loss = train_epoch(plan, count, steps), right = accuracy(held_out, held_out_count);
        printf("epoch %2d: loss %.4f, accuracy %.2f %% on the held-out fifth\n", epoch, loss, 100 * right);
    }
}

int main(int count, char **arguments)
{
    if (count != 3 && count != 4)
        refuse("usage", "trainer digits.csv weights.bin [steps.bin]");
    int found = read_images(arguments[1]), held_out = found / 5;       /* the last fifth */
    if (found < 5 * BATCH)
        refuse("too few images", arguments[1]);
    FILE *result = opened(arguments[2], "wb"), *steps = count == 4 ? opened(arguments[3], "wb") : NULL;
    train(found - held_out, images + found - held_out, held_out, steps);
    write_floats(result, &weights);
    if (fclose(result) || (steps && fclose(steps)))
        refuse("cannot write", arguments[2]);
    return 0;
}
