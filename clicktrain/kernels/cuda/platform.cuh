// What the kernels need of the device, each piece as one small function.
//
// `host/platform.cuh` declares the same names for a CPU, so that the text of the kernels runs there unchanged. No
// CUDA header is included: NVRTC alone compiles this.

struct half16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <typename Item, int Count>
struct alignas(sizeof(Item) * Count) Packed {
  Item items[Count];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
__device__ __forceinline__ float to_float(bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

// Rounding is to nearest, ties to even.
__device__ __forceinline__ void from_float(float value, float& narrow) { narrow = value; }
__device__ __forceinline__ void from_float(float value, half16& narrow) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
}
__device__ __forceinline__ void from_float(float value, bfloat16& narrow) {
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  narrow.bits = is_nan ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// One aligned access for several values.
template <int Count>
__device__ __forceinline__ Packed<float, Count> load_packed(const float* from) {
  return *reinterpret_cast<const Packed<float, Count>*>(from);
}
template <typename Item, int Count>
__device__ __forceinline__ void store_packed(Item* to, const Packed<Item, Count>& values) {
  *reinterpret_cast<Packed<Item, Count>*>(to) = values;
}

// Copy four bytes from global to shared memory, or zero where nothing exists; they arrive by `wait_for_copies`.
template <typename Word>
__device__ __forceinline__ void copy_word(Word* to, const Word* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  const int bytes = exists ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
  *to = exists ? *from : Word(0);
#endif
}
__device__ __forceinline__ void copy_async(float* to, const float* from, bool exists) { copy_word(to, from, exists); }
__device__ __forceinline__ void copy_async(int* to, const int* from, bool exists) { copy_word(to, from, exists); }
// Two bytes cannot be copied asynchronously: through a register, widened.
template <typename Narrow>
__device__ __forceinline__ void copy_async(float* to, const Narrow* from, bool exists) {
  *to = exists ? to_float(*from) : 0.0f;
}

// Wait for this thread's own copies; a barrier makes them visible to the others.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ float shuffle_xor(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}
