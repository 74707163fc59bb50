#include "device.cuh"

extern "C" const char* wantrain_delta_encode(const wantrain::Call* call) {
  return wantrain::delta_encode<wantrain::DeviceLauncher>(*call);
}
