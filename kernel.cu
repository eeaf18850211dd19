// The recurrence of modrwkv.py's wkv7, forward and backward, for one generation after another of RWKV:
//
//     S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t
//
// S is N x N for each batch and head, its rows are value channels, its columns key channels. w <= 0 is the log of the
// decay and may be -inf. All inputs are contiguous (B, T, H, N), states (B, H, N, N) in float32.
// The backward pass needs every S_t once more. It never divides by the decay, which would lose digits and fail near 0:
// the forward pass keeps the state at the start of each segment of steps, and the backward pass runs it again from there.
// Interface: the two extern "C" functions at the end. A null pointer stands for a zero state, or for nothing to be kept.

#ifdef __CUDACC__
// ---- CUDA: a block of threads per (batch, head) walks through time with the state in its registers ------------------------
//
//     S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T        u_t = S_{t-1} a_t        d_t = e^{w_t}        y_t = S_t r_t
//
// Compiled by nvcc for sm_75 and later (`compile_for_gpu` has the command); sm_75 has no cp.async, there the header's calls copy
// at once. The tests run this text on a CPU (cuda_on_cpu.h).
// Modelled for sm_90 in bfloat16, never measured: 1,070 clocks for a step of one head, 218 forward and 852 backward (1,215
// in a stricter accounting); the official kernel has 1,900.
//
// Tiles. A thread holds R = 8 rows x C columns of the state. LANES = N / C lanes side by side hold a row group, 8 whole rows;
// 32 / LANES row groups make a warp. With N = 64 and C = 4:
//
//                    columns  0..3    4..7           60..63
//        rows  0..7           lane 0  lane 1  . . .  lane 15  \  warp 0         rows 16..23   lane 0 . . .  \  warp 1 . . .
//        rows  8..15          lane 16 lane 17 . . .  lane 31  /                 rows 24..31   lane 16 . . . /
//
// Each word of r, w, k, a, b that a thread reads from shared memory then serves 8 rows: with one row per thread the kernel
// would wait for shared memory (128 bytes a clock for all warps), not for arithmetic. And since a row stays in its warp, sums
// over a row are shuffles: no step waits for the whole block.
//
// Owners. A lane OWNS row `lane % R` of its group, and its i-th row is row i ^ (lane % R). In this order R - 1 shuffles turn
// the lanes' partial sums of R rows into a total per owner, with no selecting (row_sum), and R - 1 hand it back (spread).
//
// Time. cp.async brings the next STEPS steps' inputs to shared memory during the present ones; then the thread that fetched a
// piece makes float32 of it, and decays of w. Steps beyond T are zeros: of decay e^0 = 1, they change nothing.

#ifndef CUDA_ON_CPU
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <initializer_list>
#endif
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

extern __shared__ float4 shared_memory[];

namespace {

constexpr int SEGMENT = 16;                               // steps from one kept state to the next
template <int N> constexpr int steps = N < 128 ? 4 : 2;   // STEPS: fetched together, and computed again together
enum Input { r_, k_, v_, a_, b_, d_, dy_, INPUTS };       // in shared memory: float in[steps][INPUTS][N]
enum Gradient { dr_, dk_, da_, db_, dw_, GRADIENTS };     // sums over rows: float partial[warps][GRADIENTS][STEPS][N]

struct Problem {
    unsigned T, H;
    const void* x[6];           // r, k, v, a, b, dy: (B, T, H, N)
    const float *w, *S0;        // S0 (B, H, N, N) or null: the first state; backward: the gradient of the last
    float *ST, *kept;           // ST: the last state; backward: the gradient of the first, or null. kept: see Tile::kept_at
    void *y, *grad[GRADIENTS];  // y; backward: dv
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(float& y, float x) { y = x; }
__device__ void round_to(__half& y, float x) { y = __float2half_rn(x); }
__device__ void round_to(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

template <typename T, int n> struct alignas(n * sizeof(T)) Pack { T x[n]; };  // what one instruction moves
template <int n, typename T> __device__ void load(float* to, const T* from) {
    const auto pack = *reinterpret_cast<const Pack<T, n>*>(from);
    EACH(i, n) to[i] = to_float(pack.x[i]);
}
template <int n, typename T> __device__ void store(T* to, const float* from) {
    Pack<T, n> pack;
    EACH(i, n) round_to(pack.x[i], from[i]);
    *reinterpret_cast<Pack<T, n>*>(to) = pack;
}
__device__ float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// what(e) for all e < COUNT, shared among THREADS threads
template <int COUNT, int THREADS, typename F> __device__ void share(unsigned thread, F what) {
    EACH(turn, (COUNT + THREADS - 1) / THREADS) {
        const unsigned e = turn * THREADS + thread;
        if ((turn + 1) * THREADS <= COUNT || e < COUNT) what(e);
    }
}

// The e-th 4 values, of n a step, from step t0 on, to x[base], x: (B, T, H, N). `add`: to what is there.
template <int N, int n, typename T>
__device__ void write(T* x, const Problem& p, size_t base, unsigned t0, unsigned e, float (&values)[4], bool add) {
    const unsigned t = t0 + e / (n / 4);
    x += base + size_t(t) * p.H * N + e % (n / 4) * 4;
    if (t >= p.T) return;
    if (add) EACH(i, 4) values[i] += to_float(x[i]);
    store<4>(x, values);
}

template <int N_, int C_> struct Tile {
    static constexpr int N = N_, C = C_, R = N == 16 ? 2 : 8, LANES = N / C, THREADS = N * N / (R * C);
    int group, own, column;  // the row group; the row that this lane owns; its first column, 4 others follow 4 * LANES further on

    __device__ explicit Tile(unsigned thread)
        : group(thread / LANES), own(group * R + thread % LANES % R), column(4 * (thread % LANES)) {}
    // where 4 words, i-th row and c-th column on, lie in an (N, N) matrix; in a kept state, whose layout is the same for all C
    __device__ size_t matrix_at(int i, int c) const { return size_t(own ^ i) * N + column + c * LANES; }
    __device__ size_t kept_at(int i, int c) const { return (i * (N / R) + group) * N + column + c * LANES; }

    __device__ void columns(float (&x)[C], const float* vector) const {  // a vector's values at this lane's columns
        EACH(c, C / 4) load<4>(x + 4 * c, vector + column + 4 * c * LANES);
    }
    __device__ void spread(float (&x)[R], float owned) const {  // what the owners have, to this lane's rows
        x[0] = owned;
        EACH(i, R - 1) x[i + 1] = from_lane_xor(owned, i + 1);
    }
    __device__ float row_sum(float (&x)[R]) const {  // the owned row's sum of all lanes' x; overwrites x
        _Pragma("unroll") for (int n = R / 2; n; n /= 2) EACH(i, n) x[i] += from_lane_xor(x[i + n], n);
        _Pragma("unroll") for (int n = R; n < LANES; n *= 2) x[0] += from_lane_xor(x[0], n);
        return x[0];
    }
    __device__ static void column_sum(float* to, float (&x)[4]) {  // 4 columns' sums over a warp's row groups: each writes a share
        int n = 4;
        _Pragma("unroll") for (int mask = LANES; mask < 32; mask *= 2) {
            // who takes which half: with LANES = 16, also by lane / 8, so that 16 lanes' stores of 8 bytes meet all banks
            const bool upper = (threadIdx.x ^ (LANES == 16 ? threadIdx.x << 1 : 0)) & mask;
            if (n == 1) {
                x[0] += from_lane_xor(x[0], mask);
                continue;
            }
            n /= 2, to += upper ? n : 0;
            EACH(i, n) x[i] = (upper ? x[i + n] : x[i]) + from_lane_xor(upper ? x[i] : x[i + n], mask);
        }
        store<(LANES == 32 ? 4 : LANES == 16 ? 2 : 1)>(to, x);
    }
};

// The way of STEPS steps' inputs from global to shared memory, in pieces of 16 bytes: unchanged to `raw`, as float32 to `in`.
template <typename T, int N, int VECTORS, int THREADS> struct Stage {
    static constexpr int STEPS = steps<N>, PIECES = N * sizeof(T) / 16, W_PIECES = N / 4;  // pieces of one step's vector, and w
    static constexpr int ALL = VECTORS * STEPS * PIECES, W_ALL = STEPS * W_PIECES, BYTES = 16 * (ALL + W_ALL);

    __device__ static void fetch(uint4* raw, const Problem& p, size_t base, unsigned t0) {
        auto copy = [&](unsigned e, const auto* x, unsigned t, unsigned piece) {
            x += base + size_t(t < p.T ? t : 0) * p.H * N;
            __pipeline_memcpy_async(raw + e, reinterpret_cast<const uint4*>(x) + piece, 16, t < p.T ? 0 : 16);  // the last: zeros
        };
        share<ALL, THREADS>(threadIdx.x, [&](unsigned e) {
            copy(e, static_cast<const T*>(p.x[e / (STEPS * PIECES)]), t0 + e / PIECES % STEPS, e % PIECES);
        });
        share<W_ALL, THREADS>(THREADS - 1 - threadIdx.x, [&](unsigned e) { copy(ALL + e, p.w, t0 + e / W_PIECES, e % W_PIECES); });
        __pipeline_commit();
    }
    __device__ static void unpack(float* in, const uint4* raw) {
        __pipeline_wait_prior(0);  // each thread waits for what it fetched itself, so there is no barrier in between
        share<ALL, THREADS>(threadIdx.x, [&](unsigned e) {
            constexpr int n = 16 / sizeof(T);
            const unsigned vector = e / (STEPS * PIECES), step = e / PIECES % STEPS;
            float x[n];
            load<n>(x, reinterpret_cast<const T*>(raw + e));
            EACH(i, n / 4) store<4>(in + (step * INPUTS + vector + (vector >= d_)) * N + e % PIECES * n + 4 * i, x + 4 * i);
        });
        share<W_ALL, THREADS>(THREADS - 1 - threadIdx.x, [&](unsigned e) {
            float x[4];
            load<4>(x, reinterpret_cast<const float*>(raw + ALL + e));
            EACH(i, 4) x[i] = expf(x[i]);
            store<4>(in + (e / W_PIECES * INPUTS + d_) * N + e % W_PIECES * 4, x);
        });
    }
};

// ---- forward

template <typename T, int N> struct Forward {
    using tile = Tile<N, (N < 64 ? 4 : 8)>;
    using stage = Stage<T, N, 5, tile::THREADS>;
    static constexpr int STEPS = steps<N>, THREADS = tile::THREADS, BLOCKS = 512 / THREADS;  // of an SM: 128 registers a thread
    static constexpr int IN = STEPS * INPUTS * N, Y = STEPS * N, SHARED = 4 * 2 * (IN + Y) + stage::BYTES;
};

template <typename T, int N>
__global__ void __launch_bounds__(Forward<T, N>::THREADS, Forward<T, N>::BLOCKS) forward_kernel(const __grid_constant__ Problem p) {
    using F = Forward<T, N>;
    constexpr int R = F::tile::R, C = F::tile::C, STEPS = F::STEPS;
    // two halves, of the steps by turns: there is one barrier a turn, so other warps may still be in the turn before
    float *const ins = reinterpret_cast<float*>(shared_memory), *const ys = ins + 2 * F::IN;
    uint4* const raw = reinterpret_cast<uint4*>(ys + 2 * F::Y);
    const typename F::tile tile(threadIdx.x);
    const unsigned segments = (p.T - 1) / SEGMENT + 1;
    const size_t head = blockIdx.x, base = (size_t(blockIdx.x / p.H) * p.T * p.H + blockIdx.x % p.H) * N;  // of (batch, 0, head, 0)
    auto write_y = [&](unsigned t0) {
        share<F::Y / 4, F::THREADS>(threadIdx.x, [&](unsigned e) {
            float y[4];
            load<4>(y, ys + t0 / STEPS % 2 * F::Y + 4 * e);
            write<N, N>(static_cast<T*>(p.y), p, base, t0, e, y, false);
        });
    };

    float S[R][C] = {};
    if (p.S0) EACH(i, R) EACH(c, C / 4) load<4>(S[i] + 4 * c, p.S0 + head * N * N + tile.matrix_at(i, 4 * c));
    F::stage::fetch(raw, p, base, 0);
    for (unsigned t0 = 0; t0 < p.T; t0 += STEPS) {
        float *const in = ins + t0 / STEPS % 2 * F::IN, *const my_y = ys + t0 / STEPS % 2 * F::Y + tile.own;
        F::stage::unpack(in, raw);
        __syncthreads();
        if (t0 + STEPS < p.T) F::stage::fetch(raw, p, base, t0 + STEPS);
        if (t0) write_y(t0 - STEPS);
        if (p.kept && t0 % SEGMENT == 0) {
            float* const kept = p.kept + (head * segments + t0 / SEGMENT) * N * N;
            EACH(i, R) EACH(c, C / 4) store<4>(kept + tile.kept_at(i, 4 * c), S[i] + 4 * c);
        }
        EACH(step, STEPS) {
            const float* x = in + step * INPUTS * N;
            float r[C], d[C], k[C], a[C], b[C], u[R] = {}, v[R], y[R] = {};
            tile.columns(a, x + a_ * N);
            EACH(i, R) EACH(c, C) u[i] += S[i][c] * a[c];
            tile.spread(u, tile.row_sum(u)), tile.spread(v, x[v_ * N + tile.own]);
            tile.columns(r, x + r_ * N), tile.columns(d, x + d_ * N), tile.columns(k, x + k_ * N), tile.columns(b, x + b_ * N);
            EACH(i, R) EACH(c, C) {
                S[i][c] = S[i][c] * d[c] + u[i] * b[c] + v[i] * k[c];
                y[i] += S[i][c] * r[c];
            }
            my_y[step * N] = tile.row_sum(y);
        }
    }
    __syncthreads();
    write_y((p.T - 1) / STEPS * STEPS);
    EACH(i, R) EACH(c, C / 4) store<4>(p.ST + head * N * N + tile.matrix_at(i, 4 * c), S[i] + 4 * c);
}

// ---- backward: with dS_t the gradient of S_t, y_t's share included, and du_t = dS_t b_t,
//
//     dS_t += dy_t r_t^T                        dv_t = dS_t k_t        dk_t = dS_t^T v_t        db_t = dS_t^T u_t
//     dS_{t-1} = dS_t diag(d_t) + du_t a_t^T    da_t = S_{t-1}^T du_t                           dw_t = d_t * column sums of dS_t * S_{t-1}
//     dr_t = S_t^T dy_t = d_t * S_{t-1}^T dy_t + b_t (u_t . dy_t) + k_t (v_t . dy_t)
//
// S_{t-1} cannot be had from S_t, since d_t may be 0. So each segment of 16 steps first runs forward again from its kept state:
// that gives u (to shared memory) and the states before every STEPS steps (to local memory: rare, and each thread reads only its
// own words, from the L1 cache). Then, from the last STEPS steps to the first, their states are computed once more, u being
// known, and stay in registers: 4 states and dS take 160 of the 255.
//
// Sums over rows are made within a warp at each step and over the warps once in STEPS (write_gradients). The registers of a
// block hold 64 rows of N = 128: it walks once for each half, and the second time adds to the gradients of the first.

template <typename T, int N> struct Backward {
    using tile = Tile<N, 4>;
    static constexpr int SLICES = N == 128 ? 2 : 1, ROWS = N / SLICES, THREADS = tile::THREADS / SLICES, STEPS = steps<N>;
    using stage = Stage<T, N, 6, THREADS>;
    static constexpr bool WHOLE = N < 128;  // is there shared memory for a whole segment's inputs? else they are fetched twice
    static constexpr int IN = (WHOLE ? SEGMENT : STEPS) * INPUTS * N, U = SEGMENT * ROWS, DV = STEPS * ROWS, SUMS = STEPS * N;
    static constexpr int WARPS = THREADS / 32, PARTIAL = WARPS * GRADIENTS * SUMS, SHARED = 4 * (IN + U + DV + PARTIAL) + stage::BYTES;
};

template <typename T, int N>
__device__ void write_gradients(const Problem& p, const float* partial, const float* dvs, int slice, size_t base, unsigned t0) {
    using K = Backward<T, N>;
    auto sum = [&](float (&x)[4], unsigned e) {
        load<4>(x, partial + 4 * e);
        EACH(warp, K::WARPS - 1) {
            float more[4];
            load<4>(more, partial + (warp + 1) * GRADIENTS * K::SUMS + 4 * e);
            EACH(i, 4) x[i] += more[i];
        }
    };
    share<dw_ * K::SUMS / 4, K::THREADS>(threadIdx.x, [&](unsigned e) {
        float x[4];
        sum(x, e);
        write<N, N>(static_cast<T*>(p.grad[e / (K::SUMS / 4)]), p, base, t0, e % (K::SUMS / 4), x, slice);
    });
    share<K::SUMS / 4, K::THREADS>(threadIdx.x, [&](unsigned e) {
        float x[4];
        sum(x, dw_ * K::SUMS / 4 + e);
        write<N, N>(static_cast<float*>(p.grad[dw_]), p, base, t0, e, x, slice);
    });
    share<K::DV / 4, K::THREADS>(K::THREADS - 1 - threadIdx.x, [&](unsigned e) {
        float x[4];
        load<4>(x, dvs + 4 * e);
        write<N, K::ROWS>(static_cast<T*>(p.y) + slice * K::ROWS, p, base, t0, e, x, false);
    });
}

template <typename T, int N> __global__ void __launch_bounds__(Backward<T, N>::THREADS) backward_kernel(const __grid_constant__ Problem p) {
    using K = Backward<T, N>;
    constexpr int R = K::tile::R, STEPS = K::STEPS;
    float *const ins = reinterpret_cast<float*>(shared_memory), *const us = ins + K::IN;
    float *const dvs = us + K::U, *const partial = dvs + K::DV;
    uint4* const raw = reinterpret_cast<uint4*>(partial + K::PARTIAL);
    const int segments = (p.T - 1) / SEGMENT + 1;
    const size_t head = blockIdx.x, base = (size_t(blockIdx.x / p.H) * p.T * p.H + blockIdx.x % p.H) * N;

    _Pragma("unroll 1") for (int slice = 0; slice < K::SLICES; slice++) {
        const typename K::tile tile(slice * K::THREADS + threadIdx.x);
        float* const my_sums = partial + threadIdx.x / 32 * GRADIENTS * K::SUMS + tile.column;
        float *const my_u = us + tile.own % K::ROWS, *const my_dv = dvs + tile.own % K::ROWS;
        float dS[R][4] = {}, before[STEPS][R][4];                // before: S_{t-1} of STEPS steps
        Pack<float, 4> saved[SEGMENT / STEPS][R];                // S before each STEPS steps
        auto load_kept = [&](int segment) {
            EACH(i, R) load<4>(before[0][i], p.kept + (head * segments + segment) * N * N + tile.kept_at(i, 0));
        };
        if (p.S0) EACH(i, R) load<4>(dS[i], p.S0 + head * N * N + tile.matrix_at(i, 0));
        load_kept(segments - 1);
        K::stage::fetch(raw, p, base, (segments - 1) * SEGMENT);

        _Pragma("unroll 1") for (int segment = segments - 1; segment >= 0; segment--) {
            const int t0 = segment * SEGMENT;
            _Pragma("unroll 1") for (int s = 0; s < SEGMENT; s += STEPS) {  // forward again
                float* const in = ins + (K::WHOLE ? s : 0) * INPUTS * N;
                if (!K::WHOLE) __syncthreads();
                K::stage::unpack(in, raw);
                __syncthreads();
                if (s + STEPS < SEGMENT) K::stage::fetch(raw, p, base, t0 + s + STEPS);
                EACH(i, R) store<4>(saved[s / STEPS][i].x, before[0][i]);
                EACH(step, STEPS) {
                    const float* x = in + step * INPUTS * N;
                    float d[4], k[4], a[4], b[4], u[R] = {}, v[R];
                    tile.columns(a, x + a_ * N);
                    EACH(i, R) EACH(c, 4) u[i] += before[step][i][c] * a[c];
                    tile.spread(u, my_u[(s + step) * K::ROWS] = tile.row_sum(u)), tile.spread(v, x[v_ * N + tile.own]);
                    tile.columns(d, x + d_ * N), tile.columns(k, x + k_ * N), tile.columns(b, x + b_ * N);
                    EACH(i, R) EACH(c, 4) before[(step + 1) % STEPS][i][c] = before[step][i][c] * d[c] + u[i] * b[c] + v[i] * k[c];
                }
            }

            _Pragma("unroll 1") for (int s = SEGMENT - STEPS; s >= 0; s -= STEPS) {  // and back
                const float* in = ins + (K::WHOLE ? s : 0) * INPUTS * N;
                EACH(i, R) load<4>(before[0][i], saved[s / STEPS][i].x);
                if (s < SEGMENT - STEPS) {  // of the last STEPS steps, all the rest is still there
                    if (!K::WHOLE) K::stage::unpack(ins, raw), __syncthreads();
                    EACH(step, STEPS - 1) {
                        const float* x = in + step * INPUTS * N;
                        float d[4], k[4], b[4], u[R], v[R];
                        tile.spread(u, my_u[(s + step) * K::ROWS]), tile.spread(v, x[v_ * N + tile.own]);
                        tile.columns(d, x + d_ * N), tile.columns(k, x + k_ * N), tile.columns(b, x + b_ * N);
                        EACH(i, R) EACH(c, 4) before[step + 1][i][c] = before[step][i][c] * d[c] + u[i] * b[c] + v[i] * k[c];
                    }
                }
                if (K::WHOLE ? s == 0 && segment : s + segment) K::stage::fetch(raw, p, base, s ? t0 + s - STEPS : t0 - SEGMENT);
                __syncthreads();  // the gradients of the steps before are written: `partial` and `dvs` are free
                EACH(i_step, STEPS) {
                    const int step = STEPS - 1 - i_step;
                    const float* x = in + step * INPUTS * N;
                    float r[4], d[4], k[4], a[4], b[4], u[R], v[R], dy[R], dv[R] = {}, du[R] = {}, u_dy = 0, v_dy = 0;
                    float dr[4] = {}, dk[4] = {}, da[4] = {}, db[4] = {}, dw[4] = {};
                    tile.columns(r, x + r_ * N), tile.columns(k, x + k_ * N), tile.columns(b, x + b_ * N);
                    tile.spread(u, my_u[(s + step) * K::ROWS]);
                    tile.spread(v, x[v_ * N + tile.own]), tile.spread(dy, x[dy_ * N + tile.own]);
                    EACH(i, R) {
                        u_dy += u[i] * dy[i], v_dy += v[i] * dy[i];
                        EACH(c, 4) {
                            dr[c] += before[step][i][c] * dy[i];
                            dS[i][c] += dy[i] * r[c];
                            dw[c] += dS[i][c] * before[step][i][c], dk[c] += dS[i][c] * v[i], db[c] += dS[i][c] * u[i];
                            dv[i] += dS[i][c] * k[c], du[i] += dS[i][c] * b[c];
                        }
                    }
                    tile.spread(du, tile.row_sum(du));
                    my_dv[step * K::ROWS] = tile.row_sum(dv);
                    tile.columns(d, x + d_ * N), tile.columns(a, x + a_ * N);
                    EACH(c, 4) dr[c] = dr[c] * d[c] + u_dy * b[c] + v_dy * k[c], dw[c] *= d[c];
                    EACH(i, R) EACH(c, 4) {
                        da[c] += before[step][i][c] * du[i];
                        dS[i][c] = dS[i][c] * d[c] + du[i] * a[c];
                    }
                    float(*const sums[GRADIENTS])[4] = {&dr, &dk, &da, &db, &dw};
                    EACH(g, GRADIENTS) tile.column_sum(my_sums + g * K::SUMS + step * N, *sums[g]);
                }
                if (s == 0 && segment) load_kept(segment - 1);  // under way while the gradients are written
                __syncthreads();
                write_gradients<T, N>(p, partial, dvs, slice, base, t0 + s);
            }
        }
        if (p.ST) EACH(i, R) store<4>(p.ST + head * N * N + tile.matrix_at(i, 0), dS[i]);
    }
}

// ---- launching

template <typename K> cudaError_t launch(void (*kernel)(Problem), unsigned blocks, void* stream, const Problem& p) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::SHARED);
    if (error != cudaSuccess || !blocks) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks), config.blockDim = dim3(K::THREADS);
    config.dynamicSmemBytes = K::SHARED, config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, p);
}
template <typename T, int N> cudaError_t launch(bool back, unsigned blocks, void* stream, const Problem& p) {
    if (back) return launch<Backward<T, N>>(backward_kernel<T, N>, blocks, stream, p);
    return launch<Forward<T, N>>(forward_kernel<T, N>, blocks, stream, p);
}
template <typename T> cudaError_t launch(bool back, int64_t N, unsigned blocks, void* stream, const Problem& p) {
    switch (N) {
        case 16: return launch<T, 16>(back, blocks, stream, p);
        case 32: return launch<T, 32>(back, blocks, stream, p);
        case 64: return launch<T, 64>(back, blocks, stream, p);
        case 128: return launch<T, 128>(back, blocks, stream, p);
    }
    return cudaErrorInvalidValue;
}
int launch(bool back, int64_t B, int64_t T, int64_t H, int64_t N, int dtype, void* stream, const Problem& p) {
    if (B < 0 || T < 1 || H < 1 || T > INT32_MAX - SEGMENT || B > INT32_MAX / H) return cudaErrorInvalidValue;
    uintptr_t all = reinterpret_cast<uintptr_t>(p.y);
    for (const void* x : p.x) all |= reinterpret_cast<uintptr_t>(x);
    for (const void* x : p.grad) all |= reinterpret_cast<uintptr_t>(x);
    for (const float* x : {p.w, p.S0, (const float*)p.ST, (const float*)p.kept}) all |= reinterpret_cast<uintptr_t>(x);
    if (all % 16) return cudaErrorMisalignedAddress;  // loads and stores are 16 bytes wide
    switch (dtype) {
        case 0: return launch<float>(back, N, B * H, stream, p);
        case 1: return launch<__nv_bfloat16>(back, N, B * H, stream, p);
        case 2: return launch<__half>(back, N, B * H, stream, p);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

// All tensors are contiguous and start at a multiple of 16 bytes; dtype 0, 1, 2 (float, bfloat16, float16) is that of r, k, v, a,
// b, y and their gradients, the rest is float. Returns 0 or what wkv7_error has words for; with B = 0 nothing is launched, and 0 says
// that it could be. The layout of `kept` is private.
extern "C" int wkv7_forward(int64_t B, int64_t T, int64_t H, int64_t N, int dtype, const void* r, const float* w, const void* k,
                            const void* v, const void* a, const void* b, const float* s0, void* y, float* sT, float* kept, void* stream) {
    return launch(false, B, T, H, N, dtype, stream, {unsigned(T), unsigned(H), {r, k, v, a, b}, w, s0, sT, kept, y, {}});
}
extern "C" int wkv7_backward(int64_t B, int64_t T, int64_t H, int64_t N, int dtype, const void* r, const float* w, const void* k,
                             const void* v, const void* a, const void* b, const float* kept, const void* dy, const float* dsT,
                             void* dr, float* dw, void* dk, void* dv, void* da, void* db, float* ds0, void* stream) {
    float* const states = const_cast<float*>(kept);  // only read
    return launch(true, B, T, H, N, dtype, stream,
                  {unsigned(T), unsigned(H), {r, k, v, a, b, dy}, w, dsT, ds0, states, dv, {dr, dk, da, db, dw}});
}
extern "C" const char* wkv7_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#else  // ---- CPU -----------------------------------------------------------------------------------------------------------------

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
constexpr int ROWS = 8, WIDE = 2 * LANES, STEPS = 32;  // rows at a time, backward and forward; steps of a segment
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

// y (columns, rows) from x (rows, columns), both dense, multiples of 4.
static inline void transpose(const float* x, int rows, int columns, float* y) {
    for (int i = 0; i < rows; i += 4)
        for (int j = 0; j < columns; j += 4) {
            vec4 in[4];
            for (int n = 0; n < 4; n++) memcpy(in + n, x + (i + n) * columns + j, sizeof(vec4));
            vec4 low[] = {PICK(in[0], in[1], 0, 4, 1, 5), PICK(in[2], in[3], 0, 4, 1, 5)}, high[] = {PICK(in[0], in[1], 2, 6, 3, 7), PICK(in[2], in[3], 2, 6, 3, 7)};
            vec4 out[] = {PICK(low[0], low[1], 0, 1, 4, 5), PICK(low[0], low[1], 2, 3, 6, 7), PICK(high[0], high[1], 0, 1, 4, 5), PICK(high[0], high[1], 2, 3, 6, 7)};
            for (int n = 0; n < 4; n++) memcpy(y + (j + n) * rows + i, out + n, sizeof(vec4));
        }
}

// One head's share of the arguments; at(t) is its step t.
template <int N>
struct Head {
    int64_t T, stride;
    const float *in[INPUTS], *v;

    // The inputs of `steps` steps in one place: (B, T, H, N) would have them share few lines of the cache.
    void gather(float (*x)[INPUTS][N], int64_t t0, int steps) const {
        for (int t = 0; t < steps; t++)
            for (int j = 0; j < N; j += LANES) {
                int64_t at = (t0 + t) * stride + j;
                for (int i : {R, K, A, B}) store(x[t][i] + j, load(in[i] + at));
                store(x[t][W] + j, exp(load(in[W] + at)));  // from here on W is the decay itself
            }
    }

    // Asks for the inputs of a step that will be gathered next, while the first rows compute: no machine foresees these strides.
    void ask_for(int64_t t, int share, int shares) const {
        for (int i = share; i <= INPUTS; i += shares)
            for (int j = 0; j < N; j += 16) __builtin_prefetch((i < INPUTS ? in[i] : v) + t * stride + j);
    }
};

// y_t and S_T of rows [first, last), a block of them side by side in two vectors, which spares S a and S r the sums over lanes; S_t's columns
// meet a_{t+1} while they are at hand. kept: per segment of STEPS steps the state at its start, then each step's u = S a.
template <int N>
static void forward_rows(Head<N> head, int first, int last, float* state, float* y, float* kept) {
    constexpr int VECS = N < WIDE ? 1 : 2, ROWS = VECS * LANES;
    alignas(64) float x[STEPS + 1][INPUTS][N], S[N * N], u_[N];
    for (int row = first; row < last; row += ROWS) {
        transpose(state + row * N, ROWS, N, S + row * N);
        vec u[VECS] = {};
        for (int j = 0; j < N; j++)
            for (int i = 0; i < VECS; i++) u[i] += load(S + row * N + j * ROWS + i * LANES) * head.in[A][j];
        memcpy(u_ + row, u, sizeof u);
    }
    for (int64_t t0 = 0; t0 < head.T; t0 += STEPS) {
        int steps = head.T - t0 < STEPS ? head.T - t0 : STEPS;
        head.gather(x, t0, head.T - t0 < STEPS + 1 ? head.T - t0 : STEPS + 1);
        if (t0 + steps == head.T) memset(x[steps][A], 0, sizeof x[steps][A]);  // no step follows
        for (int row = first; row < last; row += ROWS) {
            if (kept) transpose(S + row * N, N, ROWS, kept + row * N);
            vec u[VECS];  // not by memcpy: g++ would keep it in memory
            for (int i = 0; i < VECS; i++) u[i] = load(u_ + row + i * LANES);
            for (int t = 0; t < steps; t++) {
                int64_t at = (t0 + t) * head.stride + row;
                vec v[VECS], out[VECS] = {}, next[VECS] = {};
                for (int i = 0; i < VECS; i++) {
                    v[i] = load(head.v + at + i * LANES);
                    if (kept) store(kept + (N + t) * N + row + i * LANES, u[i]);
                }
                head.ask_for(t0 + STEPS + t, (row - first) / ROWS, (last - first) / ROWS);
                float* s = S + row * N;
                for (int j = 0; j < N; j++)
                    for (int i = 0; i < VECS; i++, s += LANES) {
                        vec value = load(s) * x[t][W][j] + v[i] * x[t][K][j];
                        value += u[i] * x[t][B][j];
                        store(s, value);
                        out[i] += value * x[t][R][j];
                        next[i] += value * x[t + 1][A][j];
                    }
                for (int i = 0; i < VECS; i++) {
                    store(y + at + i * LANES, out[i]);
                    u[i] = next[i];
                }
            }
            for (int i = 0; i < VECS; i++) store(u_ + row + i * LANES, u[i]);
            for (int t = steps; kept && t < STEPS; t++) memset(kept + (N + t) * N + row, 0, 4 * ROWS);
        }
        if (kept) kept += (N + STEPS) * N;
    }
    for (int row = first; row < last; row += ROWS) transpose(S + row * N, N, ROWS, state + row * N);
}

// The same for a few steps, as in decoding: to turn the state round would take longer than they do.
template <int N>
static void few_steps(Head<N> head, int first, int last, float* state, float* y) {
    alignas(64) float x[1][INPUTS][N];
    for (int64_t t = 0; t < head.T; t++) {
        head.gather(x, t, 1);
        for (int row = first; row < last; row += 4) {
            const float* v = head.v + t * head.stride + row;
            float *S = state + row * N, u[4];
            vec dot[4] = {}, dot_y[4] = {};
            for (int j = 0; j < N; j += LANES)
                for (int i = 0; i < 4; i++) dot[i] += load(S + i * N + j) * load(x[0][A] + j);
            sums(dot, u);
            for (int j = 0; j < N; j += LANES) {
                vec r = load(x[0][R] + j), d = load(x[0][W] + j), k = load(x[0][K] + j), b = load(x[0][B] + j);
                for (int i = 0; i < 4; i++) {
                    vec s = load(S + i * N + j) * d + u[i] * b + v[i] * k;
                    store(S + i * N + j, s);
                    dot_y[i] += s * r;
                }
            }
            sums(dot_y, y + t * head.stride + row);
        }
    }
}

// The gradients, from the last segment to the first. G is dL/dS, and with u = S_{t-1} a, row by row,
//     G += dy r^T,  dr = S_t^T dy,  dv = G k,  dk = G^T v,  db = G^T u,  du = G b,
//     dw = d * sum_i G * S_{t-1},  da = S_{t-1}^T du,  G <- G diag(d) + du a^T.
template <int N>
static void backward_rows(Head<N> head, int first, int last, const float* kept, const float* dy, float* const* grad, float* dv, float* dstate) {
    alignas(64) float x[STEPS][INPUTS][N], dx[STEPS][INPUTS][N], S[STEPS][ROWS * N], uy[STEPS], vy[STEPS];
    for (int64_t t0 = (head.T - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS) {
        int steps = head.T - t0 < STEPS ? head.T - t0 : STEPS;
        const float* segment = kept + t0 / STEPS * (N + STEPS) * N;
        head.gather(x, t0, steps);
        memset(dx, 0, sizeof dx), memset(uy, 0, sizeof uy), memset(vy, 0, sizeof vy);
        for (int row = first; row < last; row += ROWS) {
            float v[STEPS][ROWS], u[STEPS][ROWS], g_y[STEPS][ROWS], g_v[STEPS][ROWS], g_u[ROWS];
            memcpy(S[0], segment + row * N, sizeof S[0]);
            for (int t = 0; t < steps; t++) {  // the states once more: dividing by the decay would lose digits, or all
                memcpy(v[t], head.v + (t0 + t) * head.stride + row, sizeof v[t]);
                memcpy(u[t], segment + (N + t) * N + row, sizeof u[t]);
                memcpy(g_y[t], dy + (t0 + t) * head.stride + row, sizeof g_y[t]);
                head.ask_for(t0 - STEPS + t, (row - first) / ROWS, (last - first) / ROWS);
                for (int j = 0; t + 1 < steps && j < N; j += LANES) {
                    vec d = load(x[t][W] + j), k = load(x[t][K] + j), b = load(x[t][B] + j);
                    for (int i = 0; i < ROWS; i++) store(S[t + 1] + i * N + j, load(S[t] + i * N + j) * d + u[t][i] * b + v[t][i] * k);
                }
            }
            for (int t = steps - 1; t >= 0; t--) {
                for (int i = 0; i < ROWS; i++) uy[t] += u[t][i] * g_y[t][i], vy[t] += v[t][i] * g_y[t][i];
                float* G = dstate + row * N;
                for (int half = 0; half < ROWS; half += 4) {  // eight rows would need more registers than there are
                    vec dot_v[4] = {}, dot_u[4] = {};
                    for (int j = 0; j < N; j += LANES) {
                        vec r = load(x[t][R] + j), k = load(x[t][K] + j), b = load(x[t][B] + j);
                        for (int i = 0; i < 4; i++) {
                            float* at = G + (half + i) * N + j;
                            vec g = load(at) + g_y[t][half + i] * r;
                            store(at, g);
                            dot_v[i] += g * k;
                            dot_u[i] += g * b;
                        }
                    }
                    sums(dot_v, g_v[t] + half), sums(dot_u, g_u + half);
                }
                for (int j = 0; j < N; j += LANES) {
                    vec d = load(x[t][W] + j), a = load(x[t][A] + j), dr = load(dx[t][R] + j);
                    vec dd = load(dx[t][W] + j), dk = load(dx[t][K] + j), da = load(dx[t][A] + j), db = load(dx[t][B] + j);
                    _Pragma("GCC unroll 2")  // more would take the registers that the sums are in
                    for (int i = 0; i < ROWS; i++) {
                        vec g = load(G + i * N + j), s = load(S[t] + i * N + j);
                        dr += g_y[t][i] * s;
                        dd += g * s;
                        dk += v[t][i] * g;
                        da += g_u[i] * s;
                        db += u[t][i] * g;
                        store(G + i * N + j, g * d + g_u[i] * a);
                    }
                    store(dx[t][W] + j, dd), store(dx[t][K] + j, dk), store(dx[t][A] + j, da), store(dx[t][B] + j, db), store(dx[t][R] + j, dr);
                }
            }
            for (int t = 0; t < steps; t++) memcpy(dv + (t0 + t) * head.stride + row, g_v[t], sizeof g_v[t]);
        }
        for (int t = 0; t < steps; t++)
            for (int j = 0; j < N; j += LANES) {
                vec d = load(x[t][W] + j);
                float* at = dx[t][0] + j;
                store(at, load(at) * d + uy[t] * load(x[t][B] + j) + vy[t] * load(x[t][K] + j));
                store(at + W * N, load(at + W * N) * d);
                for (int i = 0; i < INPUTS; i++) store(grad[i] + (t0 + t) * head.stride + j, load(at + i * N));
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
        while (large && heads * groups < omp_get_max_threads() && rows > WIDE) groups *= 2, rows /= 2;
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
static void forward(int64_t batch, int64_t T, int64_t H, const float* const* in, const float* v, const float* s0, float* y, float* sT, float* kept) {
    Work work(batch, T, H, N);
#pragma omp parallel for schedule(dynamic) if (work.large)
    for (int64_t task = 0; task < work.heads * work.groups; task++) {
        int64_t head = task / work.groups, first = task % work.groups * work.rows, at = start(head, T, H, N), state = (head * N + first) * N;
        if (s0)
            memcpy(sT + state, s0 + state, 4 * work.rows * N);
        else
            memset(sT + state, 0, 4 * work.rows * N);
        auto inputs = head_of<N>(T, H, at, in, v);
        if (T < 4 && !kept)
            few_steps<N>(inputs, first, first + work.rows, sT + head * N * N, y + at);
        else
            forward_rows<N>(inputs, first, first + work.rows, sT + head * N * N, y + at, kept ? kept + head * kept_per_head(T, N) : nullptr);
    }
}

template <int N>
static void backward(int64_t batch, int64_t T, int64_t H, const float* const* in, const float* v, const float* kept, const float* dy, const float* dsT,
                     float* const* grad, float* dv, float* ds0) {
    Work work(batch, T, H, N);
    int64_t size = batch * T * H * N;
    std::vector<float> shares(work.groups > 1 ? work.groups * INPUTS * size : 0);  // each group's own, to be added up
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
            for (int i = 0; i < INPUTS; i++) to[i] = (work.groups > 1 ? shares.data() + (group * INPUTS + i) * size : grad[i]) + at;
            backward_rows<N>(head_of<N>(T, H, at, in, v), first, first + work.rows, kept + head * kept_per_head(T, N), dy + at, to, dv + at, ds0 + head * N * N);
        }
        if (work.groups > 1)
#pragma omp for
            for (int64_t n = 0; n < INPUTS * size; n++) {
                float sum = 0;
                for (int group = 0; group < work.groups; group++) sum += shares[group * INPUTS * size + n];
                grad[n / size][n % size] = sum;
            }
    }
}

extern "C" int wkv7_forward(int64_t batch, int64_t T, int64_t H, int64_t N, int dtype, const float* r, const float* w, const float* k, const float* v,
                            const float* a, const float* b, const float* s0, float* y, float* sT, float* kept, void*) {
    const float* in[] = {r, w, k, a, b};
    auto run = N == 16 ? forward<16> : N == 32 ? forward<32> : N == 64 ? forward<64> : N == 128 ? forward<128> : nullptr;
    if (!run || dtype) return 1;
    run(batch, T, H, in, v, s0, y, sT, kept);
    return 0;
}

extern "C" int wkv7_backward(int64_t batch, int64_t T, int64_t H, int64_t N, int dtype, const float* r, const float* w, const float* k, const float* v,
                             const float* a, const float* b, const float* kept, const float* dy, const float* dsT, float* dr, float* dw,
                             float* dk, float* dv, float* da, float* db, float* ds0, void*) {
    const float* in[] = {r, w, k, a, b};
    float* grad[] = {dr, dw, dk, da, db};
    auto run = N == 16 ? backward<16> : N == 32 ? backward<32> : N == 64 ? backward<64> : N == 128 ? backward<128> : nullptr;
    if (!run || dtype) return 1;
    run(batch, T, H, in, v, kept, dy, dsT, grad, dv, ds0);
    return 0;
}

extern "C" const char* wkv7_error(int error) { return error ? "on a CPU N is 16, 32, 64 or 128, in float32" : "no error"; }

#endif
