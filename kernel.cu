// The recurrence of modrwkv.py's wkv7, forward and backward, for one generation after another of RWKV:
//
//     S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t
//
// S is N x N for each batch and head, its rows are value channels, its columns key channels. w <= 0 is the log of the
// decay and may be -inf. All inputs are contiguous (B, T, H, N), states (B, H, N, N) in float32.
// The backward pass needs every S_t once more. It never divides by the decay, which would lose digits and fail near 0:
// the forward pass keeps the state at the start of each segment of steps, and the backward pass runs it again from there.
// Interface: the two extern "C" functions at the end. A null pointer stands for a zero state, or for nothing to be kept.

// ---------------------------------------------------------------------------------------------------------------- CPU

// The same two functions on a CPU, in float32. A head's rows are independent given r, w, k, a, b, so eight of them go
// through a segment of 32 steps at a time: their part of S stays in the first cache, and every load of an input feeds
// eight rows. `vec` is as wide as the machine's registers; the compiler turns + and * on it into single instructions.
//
//     g++ -O3 -march=native -fopenmp -shared -fPIC -x c++ kernel.cu -o wkv7.so

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON
#endif
constexpr int ROWS = 8, STEPS = 32;
enum Input { R, W, K, A, B, INPUTS };  // what all rows of a head share at one step

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec4 __attribute__((vector_size(16)));

static inline vec load(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }

// e^x for x <= 0: 2^n e^f with |f| <= ln(2) / 2, the Taylor series of e^f; below e^-87 it is 0.
static inline vec exp(vec x) {
    vec tiny = vec{} - 87.0f, clamped = x < tiny ? tiny : x;
    vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer n is in the low bits now
    ivec n;
    memcpy(&n, &shifted, sizeof n);
    vec f = (clamped - (shifted - 12582912.0f) * 0.693359375f) + (shifted - 12582912.0f) * 2.12194440e-4f;
    vec series = vec{} + 1.0f / 5040;
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * f + c;
    n = (n << 23) + 0x3f800000;
    vec scale;
    memcpy(&scale, &n, sizeof n);
    return x < tiny ? vec{} : series * scale;
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

// out[i] = the sum of x[i]'s lanes, for four vectors at once.
static inline void sums(const vec* x, float* out) {
    vec4 s[4];
    for (int i = 0; i < 4; i++) {
        vec4 parts[LANES / 4];
        memcpy(parts, x + i, sizeof(vec));
        s[i] = parts[0];
        for (int p = 1; p < LANES / 4; p++) s[i] += parts[p];
    }
    vec4 low = PICK(s[0], s[1], 0, 4, 1, 5) + PICK(s[0], s[1], 2, 6, 3, 7);
    vec4 high = PICK(s[2], s[3], 0, 4, 1, 5) + PICK(s[2], s[3], 2, 6, 3, 7);
    vec4 all = PICK(low, high, 0, 1, 4, 5) + PICK(low, high, 2, 3, 6, 7);
    memcpy(out, &all, sizeof all);
}

// One head's share of the arguments; at(t) is its step t.
template <int N>
struct Head {
    int64_t T, stride;
    const float *in[INPUTS], *v;

    // The inputs of `steps` steps in one place: (B, T, H, N) would have them share few lines of the cache.
    void gather(float (*x)[INPUTS][N], int64_t t0, int steps) const {
        for (int t = 0; t < steps; t++)
            for (int i = 0; i < INPUTS; i++)
                for (int j = 0; j < N; j += LANES) {
                    vec value = load(in[i] + (t0 + t) * stride + j);
                    store(x[t][i] + j, i == W ? exp(value) : value);  // from here on W is the decay itself
                }
    }
};

// y_t and S_T of rows [first, last). kept: per segment of STEPS steps the state at its start, then each step's S a.
template <int N>
static void forward_rows(Head<N> head, int first, int last, float* state, float* y, float* kept) {
    alignas(64) float x[STEPS][INPUTS][N];
    for (int64_t t0 = 0; t0 < head.T; t0 += STEPS) {
        int steps = head.T - t0 < STEPS ? head.T - t0 : STEPS;
        head.gather(x, t0, steps);
        for (int row = first; row < last; row += ROWS) {
            float* S = state + row * N;
            if (kept) memcpy(kept + row * N, S, 4 * ROWS * N);
            for (int t = 0; t < steps; t++) {
                int64_t at = (t0 + t) * head.stride + row;
                float v[ROWS], u[ROWS], out[ROWS];
                memcpy(v, head.v + at, sizeof v);
                vec dot[ROWS] = {};
                for (int j = 0; j < N; j += LANES) {
                    vec a = load(x[t][A] + j);
                    for (int i = 0; i < ROWS; i++) dot[i] += load(S + i * N + j) * a;
                }
                for (int i = 0; i < ROWS; i += 4) sums(dot + i, u + i);
                vec dot_y[ROWS] = {};
                for (int j = 0; j < N; j += LANES) {
                    vec r = load(x[t][R] + j), d = load(x[t][W] + j), k = load(x[t][K] + j), b = load(x[t][B] + j);
                    for (int i = 0; i < ROWS; i++) {
                        vec s = load(S + i * N + j) * d + u[i] * b + v[i] * k;
                        store(S + i * N + j, s);
                        dot_y[i] += s * r;
                    }
                }
                for (int i = 0; i < ROWS; i += 4) sums(dot_y + i, out + i);
                memcpy(y + at, out, sizeof out);
                if (kept) memcpy(kept + (N + t) * N + row, u, sizeof u);
            }
            for (int t = steps; kept && t < STEPS; t++) memset(kept + (N + t) * N + row, 0, 4 * ROWS);
        }
        if (kept) kept += (N + STEPS) * N;
    }
}

// The gradients, from the last segment to the first. G is dL/dS, and with u = S_{t-1} a, row by row,
//     G += dy r^T,  dr = S_t^T dy,  dv = G k,  dk = G^T v,  db = G^T u,  du = G b,
//     dw = d * sum_i G * S_{t-1},  da = S_{t-1}^T du,  G <- G diag(d) + du a^T.
template <int N>
static void backward_rows(Head<N> head, int first, int last, const float* kept, const float* dy, float* const* grad, float* dv, float* dstate) {
    alignas(64) float x[STEPS][INPUTS][N], dx[STEPS][INPUTS][N], S[STEPS + 1][ROWS * N];
    for (int64_t t0 = (head.T - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS) {
        int steps = head.T - t0 < STEPS ? head.T - t0 : STEPS;
        const float* segment = kept + t0 / STEPS * (N + STEPS) * N;
        head.gather(x, t0, steps);
        memset(dx, 0, sizeof dx);
        for (int row = first; row < last; row += ROWS) {
            float v[STEPS][ROWS], u[STEPS][ROWS], g_y[STEPS][ROWS], g_v[STEPS][ROWS], g_u[ROWS];
            memcpy(S[0], segment + row * N, sizeof S[0]);
            for (int t = 0; t < steps; t++) {  // the states once more: dividing by the decay would lose digits, or all
                memcpy(v[t], head.v + (t0 + t) * head.stride + row, sizeof v[t]);
                memcpy(u[t], segment + (N + t) * N + row, sizeof u[t]);
                memcpy(g_y[t], dy + (t0 + t) * head.stride + row, sizeof g_y[t]);
                for (int j = 0; j < N; j += LANES) {
                    vec d = load(x[t][W] + j), k = load(x[t][K] + j), b = load(x[t][B] + j);
                    for (int i = 0; i < ROWS; i++) store(S[t + 1] + i * N + j, load(S[t] + i * N + j) * d + u[t][i] * b + v[t][i] * k);
                }
            }
            for (int t = steps - 1; t >= 0; t--) {
                float* G = dstate + row * N;
                for (int half = 0; half < ROWS; half += 4) {  // eight rows would need more registers than there are
                    float* G4 = G + half * N;
                    const float *S4 = S[t + 1] + half * N, *y4 = g_y[t] + half;
                    vec dot_v[4] = {}, dot_u[4] = {};
                    for (int j = 0; j < N; j += LANES) {
                        vec r = load(x[t][R] + j), k = load(x[t][K] + j), b = load(x[t][B] + j), dr = load(dx[t][R] + j);
                        for (int i = 0; i < 4; i++) {
                            vec g = load(G4 + i * N + j) + y4[i] * r;
                            store(G4 + i * N + j, g);
                            dr += y4[i] * load(S4 + i * N + j);
                            dot_v[i] += g * k;
                            dot_u[i] += g * b;
                        }
                        store(dx[t][R] + j, dr);
                    }
                    sums(dot_v, g_v[t] + half);
                    sums(dot_u, g_u + half);
                }
                for (int j = 0; j < N; j += LANES) {
                    vec d = load(x[t][W] + j), a = load(x[t][A] + j);
                    vec dd = load(dx[t][W] + j), dk = load(dx[t][K] + j), da = load(dx[t][A] + j), db = load(dx[t][B] + j);
                    for (int i = 0; i < ROWS; i++) {
                        vec g = load(G + i * N + j), s = load(S[t] + i * N + j);
                        dd += g * s;
                        dk += v[t][i] * g;
                        da += g_u[i] * s;
                        db += u[t][i] * g;
                        store(G + i * N + j, g * d + g_u[i] * a);
                    }
                    store(dx[t][W] + j, dd), store(dx[t][K] + j, dk), store(dx[t][A] + j, da), store(dx[t][B] + j, db);
                }
            }
            for (int t = 0; t < steps; t++) memcpy(dv + (t0 + t) * head.stride + row, g_v[t], sizeof g_v[t]);
        }
        for (int t = 0; t < steps; t++)
            for (int i = 0; i < INPUTS; i++)
                for (int j = 0; j < N; j += LANES) {
                    vec value = load(dx[t][i] + j);
                    store(grad[i] + (t0 + t) * head.stride + j, i == W ? value * load(x[t][W] + j) : value);
                }
    }
}

// The work is cut by batch, head and, where these are fewer than the threads, by rows.
struct Work {
    int64_t heads;
    int groups = 1, rows;
    bool large;

    Work(int64_t B, int64_t T, int64_t H, int64_t N) : heads(B * H), rows(N), large(B * H * T * N * N > 1 << 17) {
#ifdef _OPENMP
        while (large && heads * groups < omp_get_max_threads() && rows > ROWS) groups *= 2, rows /= 2;
#endif
    }
};

template <int N>
static Head<N> head_of(int64_t T, int64_t H, int64_t at, const float* const* in, const float* v) {
    return {T, H * N, {in[R] + at, in[W] + at, in[K] + at, in[A] + at, in[B] + at}, v + at};
}

static int64_t start(int64_t head, int64_t T, int64_t H, int64_t N) { return (head / H * T * H + head % H) * N; }

static int64_t kept_per_head(int64_t T, int64_t N) { return (T + STEPS - 1) / STEPS * (N + STEPS) * N; }

template <int N>
static void forward(int64_t B_, int64_t T, int64_t H, const float* const* in, const float* v, const float* s0, float* y, float* sT, float* kept) {
    Work work(B_, T, H, N);
#pragma omp parallel for schedule(dynamic) if (work.large)
    for (int64_t task = 0; task < work.heads * work.groups; task++) {
        int64_t head = task / work.groups, first = task % work.groups * work.rows, at = start(head, T, H, N), state = (head * N + first) * N;
        if (s0)
            memcpy(sT + state, s0 + state, 4 * work.rows * N);
        else
            memset(sT + state, 0, 4 * work.rows * N);
        forward_rows<N>(head_of<N>(T, H, at, in, v), first, first + work.rows, sT + head * N * N, y + at, kept ? kept + head * kept_per_head(T, N) : nullptr);
    }
}

template <int N>
static void backward(int64_t B_, int64_t T, int64_t H, const float* const* in, const float* v, const float* kept, const float* dy, const float* dsT,
                     float* const* grad, float* dv, float* ds0) {
    Work work(B_, T, H, N);
    int64_t size = B_ * T * H * N;
    std::vector<float> sums(work.groups > 1 ? work.groups * INPUTS * size : 0);  // each group's own, to be added up
#pragma omp parallel if (work.large)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < work.heads * work.groups; task++) {
            int64_t head = task / work.groups, group = task % work.groups, first = group * work.rows;
            int64_t at = start(head, T, H, N), state = (head * N + first) * N;
            if (dsT)
                memcpy(ds0 + state, dsT + state, 4 * work.rows * N);
            else
                memset(ds0 + state, 0, 4 * work.rows * N);
            float* to[INPUTS];
            for (int i = 0; i < INPUTS; i++) to[i] = (work.groups > 1 ? sums.data() + (group * INPUTS + i) * size : grad[i]) + at;
            backward_rows<N>(head_of<N>(T, H, at, in, v), first, first + work.rows, kept + head * kept_per_head(T, N), dy + at, to, dv + at, ds0 + head * N * N);
        }
        if (work.groups > 1)
#pragma omp for
            for (int64_t n = 0; n < INPUTS * size; n++) {
                float sum = 0;
                for (int group = 0; group < work.groups; group++) sum += sums[group * INPUTS * size + n];
                grad[n / size][n % size] = sum;
            }
    }
}

extern "C" int wkv7_forward(int64_t B_, int64_t T, int64_t H, int64_t N, int, const float* r, const float* w, const float* k, const float* v,
                            const float* a, const float* b, const float* s0, float* y, float* sT, float* kept, void*) {
    const float* in[] = {r, w, k, a, b};
    auto run = N == 16 ? forward<16> : N == 32 ? forward<32> : N == 64 ? forward<64> : forward<128>;
    run(B_, T, H, in, v, s0, y, sT, kept);
    return 0;
}

extern "C" int wkv7_backward(int64_t B_, int64_t T, int64_t H, int64_t N, int, const float* r, const float* w, const float* k, const float* v,
                             const float* a, const float* b, const float* kept, const float* dy, const float* dsT, float* dr, float* dw,
                             float* dk, float* dv, float* da, float* db, float* ds0, void*) {
    const float* in[] = {r, w, k, a, b};
    float* grad[] = {dr, dw, dk, da, db};
    auto run = N == 16 ? backward<16> : N == 32 ? backward<32> : N == 64 ? backward<64> : backward<128>;
    run(B_, T, H, in, v, kept, dy, dsT, grad, dv, ds0);
    return 0;
}
