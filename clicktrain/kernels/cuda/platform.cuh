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
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  narrow.bits = is_nan ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The thread's index, read anew: what follows from it is not kept in registers over a loop.
__device__ __forceinline__ int thread_now() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// One aligned access for several values.
template <int Count, typename Item>
__device__ __forceinline__ Packed<Item, Count> load_packed(const Item* from) {
  return *reinterpret_cast<const Packed<Item, Count>*>(from);
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

// Copy eight aligned bytes, or zeros where nothing exists; as `copy_async`.
template <typename Narrow>
__device__ __forceinline__ void copy_async2(Narrow* to, const Narrow* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  const int bytes = exists ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
  const Packed<unsigned, 2> none = {};
  *reinterpret_cast<Packed<unsigned, 2>*>(to) = exists ? *reinterpret_cast<const Packed<unsigned, 2>*>(from) : none;
#endif
}

// Copy four neighbours of an aligned row at once; as `copy_async`.
__device__ __forceinline__ void copy_async4(float* to, const float* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
  const Packed<float, 4> none = {};
  *reinterpret_cast<Packed<float, 4>*>(to) = exists ? *reinterpret_cast<const Packed<float, 4>*>(from) : none;
#endif
}
template <typename Narrow>
__device__ __forceinline__ void copy_async4(float* to, const Narrow* from, bool exists) {
  Packed<Narrow, 4> narrow = {};
  if (exists) narrow = *reinterpret_cast<const Packed<Narrow, 4>*>(from);
  Packed<float, 4> wide;
  for (int i = 0; i < 4; ++i) wide.items[i] = exists ? to_float(narrow.items[i]) : 0.0f;
  *reinterpret_cast<Packed<float, 4>*>(to) = wide;
}

// Wait for this thread's own copies; a barrier makes them visible to the others.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copy a unit of sixteen aligned bytes, or zeros where nothing exists; as `copy_async`.
template <typename Narrow>
__device__ __forceinline__ void copy_unit(Packed<unsigned, 4>* to, const Narrow* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
  const Packed<unsigned, 4> none = {};
  *to = exists ? *reinterpret_cast<const Packed<unsigned, 4>*>(from) : none;
#endif
}

// Make a batch of this thread's copies since the last one, and wait until at most `Open` batches are on their way.
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Open>
__device__ __forceinline__ void wait_for_batches() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
#endif
}

// Make what the lanes of a warp wrote visible to each other.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Tensor cores (compute capability 8.0 and newer). All lanes of a warp call these together.

// Words of two values of 16 bits that are neighbours in memory; aligned as a whole.
template <int Count, typename Narrow>
__device__ __forceinline__ Packed<unsigned, Count> load_words(const Narrow* from) {
  return *reinterpret_cast<const Packed<unsigned, Count>*>(from);
}

// The lower or upper values of two words.
__device__ __forceinline__ unsigned join_halves(unsigned first, unsigned second, bool upper) {
  return __byte_perm(first, second, upper ? 0x7632u : 0x5410u);
}

__device__ __forceinline__ unsigned shuffle_xor(unsigned value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Two values, rounded as by `from_float`, the first in the lower half.
__device__ __forceinline__ unsigned round_pair(float first, float second, half16) {
  unsigned word = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
  return word;
}
__device__ __forceinline__ unsigned round_pair(float first, float second, bfloat16) {
  unsigned word = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
  return word;
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane l gives the place of row l % 8 of matrix l / 8, eight
// values at 16 bytes. Of each matrix lane t gets the values 2 * (t % 4) and the next of row t / 4; transposed: of
// column t / 4.
template <bool Transposed>
__device__ __forceinline__ Packed<unsigned, 4> load_matrices(const Packed<unsigned, 4>* row) {
  Packed<unsigned, 4> found = {};
#if __CUDA_ARCH__ >= 750
  const unsigned place = unsigned(__cvta_generic_to_shared(row));
  if (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.items[0]), "=r"(found.items[1]), "=r"(found.items[2]), "=r"(found.items[3])
                 : "r"(place)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.items[0]), "=r"(found.items[1]), "=r"(found.items[2]), "=r"(found.items[3])
                 : "r"(place)
                 : "memory");
#endif
  return found;
}

// sum[16 x 8] += a[16 x 16] * b[16 x 8]. Lane t has of the sums (row t / 4, columns 2 * (t % 4) + {0, 1}), then the
// same of row + 8; of a the words (row t / 4, k = 2 * (t % 4) + {0, 1}), row + 8, k + 8, both; of b the words
// (k = 2 * (t % 4) + {0, 1}, column t / 4), k + 8.
__device__ __forceinline__ void multiply_accumulate(float (&sum)[4], const Packed<unsigned, 4>& a, unsigned b0,
                                                    unsigned b1, half16) {
#if __CUDA_ARCH__ >= 800
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.items[0]), "r"(a.items[1]), "r"(a.items[2]), "r"(a.items[3]), "r"(b0), "r"(b1));
#endif
}
__device__ __forceinline__ void multiply_accumulate(float (&sum)[4], const Packed<unsigned, 4>& a, unsigned b0,
                                                    unsigned b1, bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.items[0]), "r"(a.items[1]), "r"(a.items[2]), "r"(a.items[3]), "r"(b0), "r"(b1));
#endif
}
