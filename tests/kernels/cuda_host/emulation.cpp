// The CUDA kernels on a host: the same source, a warp being a loop over 32 lanes in step, a grid a loop over blocks.
// It offers the C interface of the real library, so that `cuda_ops.py` runs on it too.
#include "dispatch.cuh"

namespace wantrain {

struct HostWarp {
  template <class T>
  struct Lanes {
    T lane[WARP]{};
    T& operator[](int number) { return lane[number]; }
  };

  template <class Step>
  void each(Step step) {
    for (int lane = 0; lane < WARP; ++lane) step(lane);
  }

  template <int SIZE>
  void group_max(Lanes<Row<SIZE>>& numbers, int num_lanes) {
    for (int distance = 1; distance < num_lanes; distance *= 2) {
      Lanes<Row<SIZE>> before = numbers;
      for (int lane = 0; lane < WARP; ++lane) {
        for (int u = 0; u < SIZE; ++u) {
          u32 other = before[lane ^ distance].of[u];
          if (other > numbers[lane].of[u]) numbers[lane].of[u] = other;
        }
      }
    }
  }

  template <int SIZE>
  void take_from_next(Lanes<Row<SIZE>>& numbers) {
    for (int lane = 0; lane + 1 < WARP; ++lane) numbers[lane] = numbers[lane + 1];
  }

  bool any(Lanes<bool>& holds) {
    bool is_any = false;
    for (bool is_so : holds.lane) is_any |= is_so;
    return is_any;
  }
};

// Few blocks, so that even small tensors take several turns of the loop over the grid.
constexpr int NUM_BLOCKS = 2;

struct HostLauncher {
  template <class Kernel>
  static const char* launch(const Job& job) {
    using Thread = typename Kernel::Thread;
    constexpr Thread TILE = NUM_THREADS * Kernel::NUM_OCTETS;
    HostWarp warp;
    HostWarp::Lanes<u32> digest{};
    for (int block = 0; block < NUM_BLOCKS; ++block) {
      for (int first_lane = 0; first_lane < NUM_THREADS; first_lane += WARP) {
        for (Thread first = block * TILE + first_lane; first < static_cast<Thread>(job.at.num_threads);
             first += NUM_BLOCKS * TILE) {
          Kernel::run(job, warp, first, digest);
        }
      }
    }
    u32 sum = 0;
    for (u32 part : digest.lane) sum += part;
    if (Kernel::IS_DELTA) *job.call.digest = sum;
    return nullptr;
  }
};

}  // namespace wantrain

using wantrain::Call;
using wantrain::HostLauncher;

extern "C" {
int wantrain_call_bytes() { return sizeof(Call); }
const char* wantrain_quantize(const Call* call) { return wantrain::quantize<HostLauncher>(*call); }
const char* wantrain_dequantize(const Call* call) { return wantrain::dequantize<HostLauncher>(*call); }
const char* wantrain_delta_encode(const Call* call) { return wantrain::delta_encode<HostLauncher>(*call); }
const char* wantrain_delta_decode(const Call* call) { return wantrain::delta_decode<HostLauncher>(*call); }
}
