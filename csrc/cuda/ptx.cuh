// Every PTX instruction the kernels use, once: a named function with the instruction for nvcc and
// a twin in C++ for the tests, which run the same kernel bodies on a CPU (simt/simt.h). Here: lanes
// and memory; ptx_numbers.cuh: bits and numbers; ptx_mma.cuh: tensor cores.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define W2A4_DEVICE __device__ __forceinline__
#define W2A4_HOST __host__
#define W2A4_UNROLL _Pragma("unroll")
#define W2A4_NO_UNROLL _Pragma("unroll 1")
#define W2A4_SITE_ONLY
#define W2A4_SITE
#define W2A4_SAME_SITE
#else
#include <cmath>

#include "../simt/simt.h"
#define W2A4_DEVICE inline
#define W2A4_HOST
#define W2A4_UNROLL
#define W2A4_NO_UNROLL
#endif

namespace w2a4::cuda {

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};
// ---- lanes and barriers

W2A4_DEVICE unsigned char* shared_memory() {  // dynamic, aligned to 16 bytes
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char w2a4_shared[];
  return w2a4_shared;
#else
  return simt::block->shared();
#endif
}

W2A4_DEVICE void sync_block(W2A4_SITE_ONLY) {
#ifdef __CUDACC__
  __syncthreads();
#else
  simt::sync_block(site);
#endif
}

W2A4_DEVICE void sync_warp(W2A4_SITE_ONLY) {
#ifdef __CUDACC__
  __syncwarp();
#else
  simt::sync_warp(site);
#endif
}

// ---- clusters: blocks that reach each other's shared memory, from Hopper on; before, and without
// a launch that asks for more, a cluster is one block

W2A4_DEVICE unsigned cluster_rank() {  // of this block in its cluster
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(__CUDACC__)
  return 0;
#else
  return simt::block->cluster_rank();
#endif
}

// All threads of the cluster meet here, and what they wrote can be seen by each other.
W2A4_DEVICE void sync_cluster(W2A4_SITE_ONLY) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#elif defined(__CUDACC__)
  __syncthreads();
#else
  simt::sync_cluster(site);
#endif
}

#ifndef __CUDACC__
namespace twin {
struct Shuffle {
  uint32_t value;
  int from;
};
inline void shuffle(const Shuffle* in, uint32_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = in[in[i].from & 31].value;
}
}  // namespace twin
#endif

// The value of the lane whose number differs by `mask`.
W2A4_DEVICE uint32_t shfl_xor(uint32_t value, int mask W2A4_SITE) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  return simt::warp_collective<twin::Shuffle, uint32_t, twin::shuffle>(
      "shfl_xor", site, {value, simt::lane() ^ mask});
#endif
}

#ifndef __CUDACC__
namespace twin {
inline void max_u32(const uint32_t* in, uint32_t* out) {
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) most = in[i] > most ? in[i] : most;
  for (int i = 0; i < 32; ++i) out[i] = most;
}
}  // namespace twin
#endif

// The largest value of the warp's lanes.
W2A4_DEVICE uint32_t warp_max(uint32_t value W2A4_SITE) {
#ifdef __CUDACC__
  uint32_t most;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(value));
  return most;
#else
  return simt::warp_collective<uint32_t, uint32_t, twin::max_u32>("warp_max", site, value);
#endif
}

// Kernels of one stream overlap: a kernel may start before the one it follows has ended (runtime.h,
// launch). It waits here until that one, and with it all before it, has ended and its writes can
// be seen; only weights, which nothing writes while a model runs, may be read before. All threads
// of every kernel call this, before anything that they write.
W2A4_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// *p = max(*p, value), also when other lanes do so at once.
W2A4_DEVICE void atomic_max(uint32_t* p, uint32_t value) {
#ifdef __CUDACC__
  atomicMax(p, value);
#else
  simt::atomic_max(p, value);
#endif
}
// ---- memory

// base + row * stride in one instruction, which the compiler does not take apart.
W2A4_DEVICE const uint8_t* row_of(const uint8_t* base, uint32_t row, uint32_t stride) {
#ifdef __CUDACC__
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(base));
  return reinterpret_cast<const uint8_t*>(address);
#else
  return base + size_t{row} * stride;
#endif
}

// Asynchronous copy of 16 bytes from global to shared memory, past L1; the bytes from `from_bytes`
// (0 or 16) on are zero.
W2A4_DEVICE void cp_async_16(void* to, const void* from, int from_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(from_bytes)
               : "memory");
#else
  simt::block->copy_async(to, from, 16, from_bytes);
#endif
}

// The same of 8 bytes, all of them, through L1.
W2A4_DEVICE void cp_async_8(void* to, const void* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  simt::block->copy_async(to, from, 8, 8);
#endif
}

// The same of 4 bytes, which are zero if from_bytes is 0 and not 4.
W2A4_DEVICE void cp_async_4(void* to, const void* from, int from_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(from_bytes)
               : "memory");
#else
  simt::block->copy_async(to, from, 4, from_bytes);
#endif
}

W2A4_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::block->commit_copies();
#endif
}

// Waits until at most kPending of this lane's committed groups are under way.
template <int kPending>
W2A4_DEVICE void cp_async_wait(W2A4_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::block->wait_copies(kPending, site);
#endif
}

// Reads what does not change while the kernel runs. Not through __ldg: the compiler may move that
// above wait_for_previous_kernel.
W2A4_DEVICE uint32_t load_u32(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const uint32_t*>(p);
#else
  return simt::load_constant<uint32_t>(p);
#endif
}
W2A4_DEVICE uint16_t load_u16(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const uint16_t*>(p);
#else
  return simt::load_constant<uint16_t>(p);
#endif
}
W2A4_DEVICE U32x4 load_u32x4(const void* p) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
#else
  return simt::load_constant<U32x4>(p);
#endif
}
// x, which the compiler takes for new: loads that depend on it stay below the mma above.
W2A4_DEVICE int fence_loads(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

W2A4_DEVICE U32x2 load_u32x2(const void* p) {  // as load_u32x4
#ifdef __CUDACC__
  const uint2 v = *static_cast<const uint2*>(p);
  return {v.x, v.y};
#else
  return simt::load_constant<U32x2>(p);
#endif
}

// Reads what this kernel may have written.
W2A4_DEVICE uint32_t read_u32(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const uint32_t*>(p);
#else
  return simt::load<uint32_t>(p);
#endif
}
W2A4_DEVICE U32x4 read_u32x4(const void* p) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
#else
  return simt::load<U32x4>(p);
#endif
}
W2A4_DEVICE U32x2 read_u32x2(const void* p) {
#ifdef __CUDACC__
  const uint2 v = *static_cast<const uint2*>(p);
  return {v.x, v.y};
#else
  return simt::load<U32x2>(p);
#endif
}

W2A4_DEVICE void store_u32x4(void* p, const U32x4& x) {
#ifdef __CUDACC__
  *static_cast<uint4*>(p) = make_uint4(x.x, x.y, x.z, x.w);
#else
  simt::store(p, x);
#endif
}
W2A4_DEVICE void store_u32x2(void* p, const U32x2& x) {
#ifdef __CUDACC__
  *static_cast<uint2*>(p) = make_uint2(x.x, x.y);
#else
  simt::store(p, x);
#endif
}
W2A4_DEVICE void store_u32(void* p, uint32_t x) {
#ifdef __CUDACC__
  *static_cast<uint32_t*>(p) = x;
#else
  simt::store(p, x);
#endif
}

// Stores to the place of `p`, which is of this block's shared memory, in that of block `rank` of
// the cluster. That block must have begun, and not have ended: sync_cluster.
W2A4_DEVICE void store_peer_u32x4(void* p, unsigned rank, const U32x4& x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 to;\n"
      "mapa.shared::cluster.u32 to, %0, %1;\n"
      "st.shared::cluster.v4.b32 [to], {%2, %3, %4, %5};\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))),
      "r"(rank), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
      : "memory");
#elif defined(__CUDACC__)
  store_u32x4(p, x);
#else
  simt::store(simt::block->in_peer(p, rank), x);
#endif
}
W2A4_DEVICE void store_peer_u32(void* p, unsigned rank, uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 to;\n"
      "mapa.shared::cluster.u32 to, %0, %1;\n"
      "st.shared::cluster.b32 [to], %2;\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))),
      "r"(rank), "r"(x)
      : "memory");
#elif defined(__CUDACC__)
  store_u32(p, x);
#else
  simt::store(simt::block->in_peer(p, rank), x);
#endif
}

}  // namespace w2a4::cuda
