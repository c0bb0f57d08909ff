// What one would write by hand: the yardstick for the instruction counts of test_sass.py.  Neutral forms.
#define MUL(a, b) (sizeof(real) == 4 ? (real)__fmul_rn(a, b) : (real)__dmul_rn(a, b))
#define ADD(a, b) (sizeof(real) == 4 ? (real)__fadd_rn(a, b) : (real)__dadd_rn(a, b))
#define DIV(a, b) (sizeof(real) == 4 ? (real)__fdiv_rn(a, b) : (real)__ddiv_rn(a, b))
#define ROOT(a) (sizeof(real) == 4 ? (real)__fsqrt_rn(a) : (real)__dsqrt_rn(a))
#define SUB(a, b) ADD(a, -(b))
#define FLUSH(x) (fabs(x) < tiny ? zero : (x))

template <class real> struct wide;
template <> struct __align__(16) wide<float> { float at[4]; };
template <> struct __align__(16) wide<double> { double at[2]; };

template <class real> __device__ void rmsprop(real &p, real g, real &v, real scale, real rho, real one_minus_rho, real lr, real eps,
                                              real decay, real tiny, real zero)
{
    g = MUL(g, scale);
    v = FLUSH(ADD(MUL(rho, v), MUL(MUL(one_minus_rho, g), g)));
    p = SUB(p, ADD(DIV(MUL(lr, g), ADD(ROOT(v), eps)), MUL(decay, p)));
}
template <class real> __device__ void adam(real &p, real g, real &m, real &v, real scale, real beta1, real a1, real beta2, real a2,
                                           real lr, real root_scale, real eps, real decay, real tiny, real zero)
{
    g = MUL(g, scale);
    m = FLUSH(ADD(MUL(beta1, m), MUL(a1, g)));
    v = FLUSH(ADD(MUL(beta2, v), MUL(MUL(a2, g), g)));
    p = SUB(p, ADD(DIV(MUL(lr, m), ADD(MUL(ROOT(v), root_scale), eps)), MUL(decay, p)));
}

#define LANES (16 / sizeof(real))
#define KERNEL(name, rule, buffers, load, lane, store, single, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(256) name                                                                  \
    buffers {                                                                                                               \
        unsigned long long t = blockIdx.x * 256ull + threadIdx.x, head = -(unsigned long long)p % 16 / sizeof(real);        \
        if (t < vectors) { load; for (int k = 0; k < LANES; k++) lane; store; }                                             \
        else { t -= vectors; if (t >= head) t += vectors * LANES; if (t < size) single; }                                   \
    }
#define WIDE(x) ((wide<real> *)(x + head))[t]
#define RMS(name)                                                                                                           \
    KERNEL(name, rmsprop, (real *__restrict__ p, const real *g, real *__restrict__ v, unsigned long long size,              \
        unsigned long long vectors, real s, real r, real o, real lr, real e, real d, real tiny, real zero),                 \
        wide<real> P = WIDE(p); wide<real> G = WIDE(g); wide<real> V = WIDE(v),                                             \
        rmsprop<real>(P.at[k], G.at[k], V.at[k], s, r, o, lr, e, d, tiny, zero),                                            \
        WIDE(p) = P; WIDE(v) = V, { rmsprop<real>(p[t], g[t], v[t], s, r, o, lr, e, d, tiny, zero); })
#define ADAM(name)                                                                                                          \
    KERNEL(name, adam, (real *__restrict__ p, const real *g, real *__restrict__ m, real *__restrict__ v,                    \
        unsigned long long size, unsigned long long vectors, real s, real b1, real a1, real b2, real a2, real lr, real rs,  \
        real e, real d, real tiny, real zero),                                                                              \
        wide<real> P = WIDE(p); wide<real> G = WIDE(g); wide<real> M = WIDE(m); wide<real> V = WIDE(v),                     \
        adam<real>(P.at[k], G.at[k], M.at[k], V.at[k], s, b1, a1, b2, a2, lr, rs, e, d, tiny, zero),                        \
        WIDE(p) = P; WIDE(m) = M; WIDE(v) = V, { adam<real>(p[t], g[t], m[t], v[t], s, b1, a1, b2, a2, lr, rs, e, d, tiny, zero); })

#define real REAL
RMS(rmsprop_kernel)
ADAM(adam_kernel)
