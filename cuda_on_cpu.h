// Lets g++ compile the CUDA section of kernel.cu and run it on a CPU, thread by thread, to test it without a GPU:
//
//     g++ -std=c++20 -shared -fPIC -Wno-unknown-pragmas -D__CUDACC__ -include cuda_on_cpu.h -x c++ kernel.cu -o kernel.so
//
// Only what kernel.cu uses is here. A CUDA thread is a fibre: it runs until a barrier or a shuffle must wait for others.
// A warp then runs as far ahead of the other warps as the block's barriers let it; warps and lanes take turns in the order
// CUDA_ON_CPU_ORDER says: 0 ascending, -1 descending, any other number seeds a random order. A program without races gives
// bitwise equal results in all orders. To show others: shared memory starts as NaN, and a cp.async makes NaN of its target at
// once, but copies only in the wait that makes it sure; with -DCUDA_ON_CPU_ARCH=75 it copies at once, as sm_75 does. A deadlock,
// a divergent barrier, misaligned copies and writes beyond the shared memory that was asked for end the process with a message.
#pragma once
#define CUDA_ON_CPU
#ifndef CUDA_ON_CPU_ARCH
#define CUDA_ON_CPU_ARCH 80
#endif
#undef _FORTIFY_SOURCE  // it forbids longjmp from one stack to another
#include <algorithm>
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMisalignedAddress = 716 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes = 0; cudaStream_t stream = nullptr; };
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "an error of the CPU's CUDA" : "no error"; }

// ---- numbers of 16 bits, rounded to nearest even
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return {uint16_t(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
    const uint32_t u = (x.bits & 0x7fff) << 13;  // the exponent is 112 too small, which a product mends, also for subnormals
    const float y = u < 0x0f800000 ? std::bit_cast<float>(u) * 0x1p112f : std::bit_cast<float>(u | 0x7f800000);
    return x.bits & 0x8000 ? -y : y;
}
inline __half __float2half_rn(float x) {
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0, u = std::bit_cast<uint32_t>(std::fabs(x));
    if (x != x) return {0x7fff};
    if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more: infinity
    if (u < 0x38800000) return {uint16_t(sign | (std::bit_cast<uint32_t>(std::fabs(x) + 0.5f) - 0x3f000000))};  // subnormal
    return {uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13)};
}

// ---- threads
inline dim3 threadIdx, blockIdx;
constexpr size_t SHARED_LIMIT = 64 << 10, GUARD = 4 << 10, STACK = 128 << 10;  // the limit of sm_75; a margin that nobody may write
inline float4 shared_memory[(SHARED_LIMIT + GUARD) / 16];
extern "C" { inline cudaStream_t last_stream; inline size_t last_shared; }  // of the last launch, for tests to see

namespace on_cpu {

struct Gate { int size, arrived = 0, line = 0; unsigned opened = 0; };  // a barrier
struct Copy { void* to; const void* from; size_t bytes, zeros; };
struct Warp { Gate gate{32}; float shown[2][32]; };
struct Fibre {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t start;
    jmp_buf here;
    bool started, done;
    Gate* waits_for;
    unsigned since;
    std::vector<std::vector<Copy>> copies;  // committed groups, and a last one that is still open
};
inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline Gate block;
inline unsigned running;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void fail(const char* what, int line = 0) {
    std::fprintf(stderr, "cuda_on_cpu: %s (line %d, block %u, thread %u)\n", what, line, blockIdx.x, running);
    std::abort();
}
[[gnu::noinline]] inline void leave() {
    if (!_setjmp(fibres[running].here)) _longjmp(scheduler, 1);
}
[[gnu::noinline]] inline void resume(unsigned thread) {
    running = threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (fibres[thread].started) _longjmp(fibres[thread].here, 1);
    fibres[thread].started = true;
    setcontext(&fibres[thread].start);
}
inline void run() {
    body();
    fibres[running].done = true;
    leave();
}
inline void wait(Gate& gate, int line) {
    Fibre& f = fibres[running];
    if (gate.arrived && gate.line != line) fail("threads wait at different barriers", line);
    gate.line = line, f.waits_for = &gate, f.since = gate.opened;
    if (++gate.arrived == gate.size) gate.arrived = 0, gate.opened++;
    else leave();
    f.waits_for = nullptr;
}
inline float shuffle_xor(float x, int mask, int line) {
    Warp& warp = warps[running / 32];
    float* shown = warp.shown[warp.gate.opened % 2];  // by turns: some may still read what was shown before
    shown[running % 32] = x;
    wait(warp.gate, line);
    return shown[running % 32 ^ mask];
}
inline void run_block(unsigned threads, size_t shared, int order, std::mt19937& random) {
    std::memset(shared_memory, 0xff, sizeof shared_memory);
    if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
    warps.assign(threads / 32, Warp()), block = Gate{int(threads)};
    for (unsigned i = 0; i < threads; i++) {
        Fibre& f = fibres[i];
        f.started = f.done = false, f.waits_for = nullptr, f.copies.assign(1, {});
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.data(), f.start.uc_stack.ss_size = STACK, f.start.uc_link = nullptr;
        makecontext(&f.start, run, 0);
    }
    auto turns = [&](unsigned n) {
        std::vector<unsigned> x(n);
        for (unsigned i = 0; i < n; i++) x[i] = order == -1 ? n - 1 - i : i;
        if (order > 0) std::shuffle(x.begin(), x.end(), random);
        return x;
    };
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned warp : turns(threads / 32))
            for (bool again = true; again; again = again && (order <= 0 || random() % 64)) {
                again = false;
                for (unsigned lane : turns(32)) {
                    Fibre& f = fibres[warp * 32 + lane];
                    if (f.done || (f.waits_for && f.waits_for->opened == f.since)) continue;
                    resume(warp * 32 + lane);
                    again = moved = true;
                }
            }
    }
    for (unsigned i = 0; i < threads; i++) if (!fibres[i].done) fail("deadlock: a barrier that not all threads reach", block.line);
    const char* const bytes = reinterpret_cast<const char*>(shared_memory);
    if (std::any_of(bytes + shared, bytes + sizeof shared_memory, [](char x) { return x != -1; })) fail("a write beyond shared memory");
}

}  // namespace on_cpu

#define __syncthreads() on_cpu::wait(on_cpu::block, __LINE__)
#define __shfl_xor_sync(all, x, mask) on_cpu::shuffle_xor(x, mask, -__LINE__)
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    if (bytes != 16 || uintptr_t(to) % 16 || uintptr_t(from) % 16) on_cpu::fail("a copy that is not 16 bytes, aligned");
    std::memset(to, CUDA_ON_CPU_ARCH < 80 ? 0 : 0xff, bytes);
    if (CUDA_ON_CPU_ARCH < 80) return void(std::memcpy(to, from, bytes - zeros));
    on_cpu::fibres[on_cpu::running].copies.back().push_back({to, from, bytes, zeros});
}
inline void __pipeline_commit() { on_cpu::fibres[on_cpu::running].copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t but) {
    for (auto& copies = on_cpu::fibres[on_cpu::running].copies; copies.size() > but + 1; copies.erase(copies.begin()))
        for (auto& c : copies.front()) std::memset(c.to, 0, c.bytes), std::memcpy(c.to, c.from, c.bytes - c.zeros);
}
template <class K> cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int bytes) { return cudaError_t(bytes > int(SHARED_LIMIT)); }
template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    const char* variable = std::getenv("CUDA_ON_CPU_ORDER");
    const int order = variable ? std::atoi(variable) : 0;
    const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
    std::mt19937 random(order);
    if (config->dynamicSmemBytes > SHARED_LIMIT || threads % 32) return cudaErrorInvalidValue;
    last_stream = config->stream, last_shared = config->dynamicSmemBytes;
    on_cpu::body = [&] { kernel(arguments...); };
    for (unsigned i = 0; i < blocks; i++) {
        blockIdx.x = order == -1 ? blocks - 1 - i : i;
        on_cpu::run_block(threads, last_shared, order, random);
    }
    return cudaSuccess;
}
