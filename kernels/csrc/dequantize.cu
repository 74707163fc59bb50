#include "device.cuh"

extern "C" const char* wantrain_dequantize(const wantrain::Call* call) {
  return wantrain::dequantize<wantrain::DeviceLauncher>(*call);
}
