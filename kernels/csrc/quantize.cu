#include "device.cuh"

extern "C" const char* wantrain_quantize(const wantrain::Call* call) {
  return wantrain::quantize<wantrain::DeviceLauncher>(*call);
}
