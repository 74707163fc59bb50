// From what is asked for at run time to the kernel compiled for it. `Launcher` starts a kernel: on a GPU
// (`device.cuh`), or as a loop in the tests.
#pragma once

#include "kernels.cuh"

namespace wantrain {

template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};

template <class Function>
const char* with_bits(int bits, Function function) {
  switch (bits) {
    case 2: return function(Constant<2>{});
    case 3: return function(Constant<3>{});
    case 4: return function(Constant<4>{});
    case 6: return function(Constant<6>{});
    case 8: return function(Constant<8>{});
    default: return "no kernel for this number of bits";
  }
}

template <class Function>
const char* with_type(int type, Function function) {
  switch (type) {
    case FLOAT32: return function(Constant<FLOAT32>{});
    case BFLOAT16: return function(Constant<BFLOAT16>{});
    case FLOAT16: return function(Constant<FLOAT16>{});
    default: return "no kernel for this type of values";
  }
}

template <class Function>
const char* with_base_type(int type, Function function) {
  switch (type) {
    case BFLOAT16: return function(Constant<BFLOAT16>{});
    case FLOAT16: return function(Constant<FLOAT16>{});
    default: return "no kernel for this type of base";
  }
}

template <class Function>
const char* with_bool(bool choice, Function function) {
  return choice ? function(Constant<true>{}) : function(Constant<false>{});
}

template <class Launcher, Type M>
const char* encode_with(const Call& call) {
  Job job = job_of(call);
  return with_bits(call.bits, [&](auto bits) {
    return with_type(call.value_type, [&](auto type) {
      return with_bool(call.is_stochastic, [&](auto is_stochastic) {
        return with_bool(is_aligned(job), [&](auto aligned) {
          using Kernel = Encode<decltype(bits)::value, decltype(type)::value, M, decltype(is_stochastic)::value,
                                decltype(aligned)::value>;
          return Launcher::template launch<Kernel>(job);
        });
      });
    });
  });
}

template <class Launcher, Type M>
const char* decode_with(const Call& call) {
  Job job = job_of(call);
  return with_bits(call.bits, [&](auto bits) {
    return with_type(call.value_type, [&](auto type) {
      return with_bool(is_aligned(job), [&](auto aligned) {
        using Kernel = Decode<decltype(bits)::value, decltype(type)::value, M, decltype(aligned)::value>;
        return Launcher::template launch<Kernel>(job);
      });
    });
  });
}

template <class Launcher>
const char* quantize(const Call& call) {
  return encode_with<Launcher, NOTHING>(call);
}

template <class Launcher>
const char* dequantize(const Call& call) {
  return decode_with<Launcher, NOTHING>(call);
}

template <class Launcher>
const char* delta_encode(const Call& call) {
  return with_base_type(call.base_type,
                        [&](auto type) { return encode_with<Launcher, decltype(type)::value>(call); });
}

template <class Launcher>
const char* delta_decode(const Call& call) {
  return with_base_type(call.base_type,
                        [&](auto type) { return decode_with<Launcher, decltype(type)::value>(call); });
}

}  // namespace wantrain
