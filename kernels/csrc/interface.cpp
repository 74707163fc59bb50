// What Python checks before it calls: that both sides mean the same by `Call`.
#include "call.cuh"

extern "C" int wantrain_call_bytes() { return sizeof(wantrain::Call); }
