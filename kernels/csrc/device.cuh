// A warp of the GPU, and how a kernel is started on it.
#pragma once

#include <cuda_runtime.h>

#include "dispatch.cuh"

namespace wantrain {

// Chosen: 4 blocks of 256 threads leave 64 registers to a thread, and each thread has two to four octets under way.
constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;
// Chosen: blocks that take turns even out what multiprocessors differ in; more of them only start more often.
constexpr int TURNS = 8;

constexpr int MIN_LANES = 4;  // of a group: the smallest has 32 values

struct DeviceWarp {
  // What each lane holds; here only the calling thread's.
  template <class T>
  struct Lanes {
    T own;
    __device__ __forceinline__ T& operator[](int) { return own; }
  };

  template <class Step>
  __device__ __forceinline__ void each(Step step) {
    step(static_cast<int>(threadIdx.x % WARP));
  }

  // Give every lane the greatest of its group of lanes.
  template <int SIZE>
  __device__ __forceinline__ void group_max(Lanes<Row<SIZE>>& numbers, int num_lanes) {
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
      if (distance >= MIN_LANES && distance >= num_lanes) break;
#pragma unroll
      for (int u = 0; u < SIZE; ++u) {
        numbers.own.of[u] = max(numbers.own.of[u], __shfl_xor_sync(~0u, numbers.own.of[u], distance));
      }
    }
  }

  template <int SIZE>
  __device__ __forceinline__ void take_from_next(Lanes<Row<SIZE>>& numbers) {
#pragma unroll
    for (int u = 0; u < SIZE; ++u) numbers.own.of[u] = __shfl_down_sync(~0u, numbers.own.of[u], 1);
  }

  __device__ __forceinline__ bool any(Lanes<bool>& holds) { return __any_sync(~0u, holds.own); }
};

// Add up all blocks' digests in one launch. `scratch` counts the blocks that are done in its low half and sums their
// parts modulo 2^32 in the high one, where an overflow falls off the end: one atomic addition does both, no fence is
// needed, and the last block leaves 0 for the next launch on the stream. (Two streams need two.)
__device__ inline void tally(const Call& call, u32 part) {
  __shared__ u32 parts[NUM_THREADS / WARP];
  part = __reduce_add_sync(~0u, part);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  u64 sum = 0;
  for (int warp = 0; warp < NUM_THREADS / WARP; ++warp) sum += parts[warp];
  u64 own = sum << 32 | 1u;
  u64 all = atomicAdd(reinterpret_cast<unsigned long long*>(call.scratch), own) + own;
  if (static_cast<u32>(all) != gridDim.x) return;
  *call.digest = static_cast<i64>(all >> 32);
  *call.scratch = 0;
}

template <class Kernel>
__global__ void __launch_bounds__(NUM_THREADS, BLOCKS_PER_MULTIPROCESSOR) start(const __grid_constant__ Job job) {
  constexpr typename Kernel::Thread TILE = NUM_THREADS * Kernel::NUM_OCTETS;
  DeviceWarp warp;
  DeviceWarp::Lanes<u32> digest{0};
  using Thread = typename Kernel::Thread;
  Thread first = blockIdx.x * TILE + threadIdx.x / WARP * WARP;
  for (; first < static_cast<Thread>(job.at.num_threads); first += gridDim.x * TILE) {
    Kernel::run(job, warp, first, digest);
  }
  if constexpr (Kernel::IS_DELTA) tally(job.call, digest.own);
}

struct DeviceLauncher {
  template <class Kernel>
  static const char* launch(const Job& job) {
    int previous = 0, num_multiprocessors = 0, device = job.call.device;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess && device != previous) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      start<Kernel><<<num_blocks<Kernel>(job, num_multiprocessors), NUM_THREADS, 0,
                      static_cast<cudaStream_t>(job.call.stream)>>>(job);
      error = cudaGetLastError();
    }
    if (device != previous) cudaSetDevice(previous);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

  template <class Kernel>
  static int num_blocks(const Job& job, int num_multiprocessors) {
    i64 tile = NUM_THREADS * Kernel::NUM_OCTETS, tiles = (job.at.num_threads + tile - 1) / tile;
    i64 most = i64{num_multiprocessors} * BLOCKS_PER_MULTIPROCESSOR * TURNS;
    i64 tiles_per_block = (tiles + most - 1) / most;
    return static_cast<int>((tiles + tiles_per_block - 1) / tiles_per_block);
  }
};

}  // namespace wantrain
