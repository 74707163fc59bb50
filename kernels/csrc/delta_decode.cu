#include "device.cuh"

extern "C" const char* wantrain_delta_decode(const wantrain::Call* call) {
  return wantrain::delta_decode<wantrain::DeviceLauncher>(*call);
}
