// Eight-lane vectors: the unit of every CPU kernel.
//
// Activations are "blocked": [blocks][channels][height][width][8] floats. The eight lanes of a block are eight
// images (or, for small batches, eight strips of one image), so a vector is one pixel of all of them. Every load
// is a whole vector whatever the stride, the padding and the width, and any sparsity of the weights vectorises.
//
// Plain GCC vector extensions: under AVX2 and AVX-512 a Vec is one register, in the portable build the compiler
// splits it. The file is included once per instruction set, inside a namespace of its own, after the including file
// has named the set (CLICKTRAIN_ISA) and the width of its registers (CLICKTRAIN_VECTOR_BITS): the compiler's own
// macros do not follow `#pragma GCC target` in g++ before 13.
#pragma once

#ifndef CLICKTRAIN_VECTOR_BITS
#error "define CLICKTRAIN_ISA and CLICKTRAIN_VECTOR_BITS first"
#endif

namespace CLICKTRAIN_ISA {

constexpr int kLanes = 8;

typedef float Vec __attribute__((vector_size(32)));
typedef float UnalignedVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Shuffle __attribute__((vector_size(32)));

#define CLICKTRAIN_INLINE inline __attribute__((always_inline))

CLICKTRAIN_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
CLICKTRAIN_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
// Store past the caches, to an address aligned like a Vec; `drain` must follow before another thread reads.
CLICKTRAIN_INLINE void stream(float* p, Vec v) {
#if CLICKTRAIN_VECTOR_BITS >= 256
  __builtin_ia32_movntps256(p, v);
#else
  store(p, v);
#endif
}
CLICKTRAIN_INLINE void drain() {
#if CLICKTRAIN_VECTOR_BITS >= 256
  __builtin_ia32_sfence();
#endif
}

#if CLICKTRAIN_VECTOR_BITS >= 512
// Two neighbouring pixels: one register of AVX-512.
typedef float Pair __attribute__((vector_size(64)));
typedef float UnalignedPair __attribute__((vector_size(64), aligned(4), may_alias));

CLICKTRAIN_INLINE Pair load_pair(const float* p) { return *reinterpret_cast<const UnalignedPair*>(p); }
CLICKTRAIN_INLINE void store(float* p, Pair v) { *reinterpret_cast<UnalignedPair*>(p) = v; }
CLICKTRAIN_INLINE Pair broadcast_pair(float f) { return f - Pair{}; }
CLICKTRAIN_INLINE void pin(Pair& v) { asm("" : "+v"(v)); }
// Only the first or only the second pixel; the other is zero, and its memory is not touched.
CLICKTRAIN_INLINE Pair load_first(const float* p) { return __builtin_ia32_loadups512_mask(p, Pair{}, 0x00ff); }
CLICKTRAIN_INLINE Pair load_second(const float* p) { return __builtin_ia32_loadups512_mask(p, Pair{}, 0xff00); }
// Two pixels from two places.
CLICKTRAIN_INLINE Pair load_two(const float* first, const float* second) {
  return __builtin_ia32_insertf32x8_mask(load_first(first), load(second), 1, Pair{}, 0xffff);
}
CLICKTRAIN_INLINE Vec first(Pair v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
CLICKTRAIN_INLINE Vec second(Pair v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
CLICKTRAIN_INLINE Vec fold(Pair v) { return first(v) + second(v); }
CLICKTRAIN_INLINE void stream(float* p, Pair v) { stream(p, first(v)), stream(p + kLanes, second(v)); }
CLICKTRAIN_INLINE Pair relu(Pair v) { return v < 0.0f ? Pair{} : v; }
CLICKTRAIN_INLINE Pair larger(Pair a, Pair b) { return (b > a) | (b != b) ? b : a; }
// sum += a * b, of both pixels or of one: padding beside a pixel is not even multiplied with zero.
CLICKTRAIN_INLINE void add_all(Pair& sum, Pair a, Pair b) { sum += a * b; }
CLICKTRAIN_INLINE void add_first(Pair& sum, Pair a, Pair b) {
  sum = __builtin_ia32_vfmaddps512_mask3(a, b, sum, 0x00ff, 4);
}
CLICKTRAIN_INLINE void add_second(Pair& sum, Pair a, Pair b) {
  sum = __builtin_ia32_vfmaddps512_mask3(a, b, sum, 0xff00, 4);
}
#endif

CLICKTRAIN_INLINE void add_all(Vec& sum, Vec a, Vec b) { sum += a * b; }

CLICKTRAIN_INLINE Vec broadcast(float f) { return Vec{f, f, f, f, f, f, f, f}; }

// NaN stays NaN, as in torch.relu.
CLICKTRAIN_INLINE Vec relu(Vec v) { return v < 0.0f ? Vec{} : v; }

// NaN if either is, as in torch.max_pool2d.
CLICKTRAIN_INLINE Vec larger(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

// Keep the compiler from loading a vector again for each of its uses.
CLICKTRAIN_INLINE void pin(Vec& v) {
#if CLICKTRAIN_VECTOR_BITS >= 512
  asm("" : "+v"(v));  // any of the 32 registers
#elif CLICKTRAIN_VECTOR_BITS >= 256
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// Sum of the lanes in a fixed order, so that it does not depend on the instruction set's own reductions.
CLICKTRAIN_INLINE float sum(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Turn eight vectors from eight sources into eight vectors of one lane each: a transposed 8 x 8 block.
CLICKTRAIN_INLINE void transpose(Vec (&v)[kLanes]) {
  Vec pairs[kLanes], quads[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = __builtin_shuffle(v[i], v[i + 1], Shuffle{0, 8, 1, 9, 4, 12, 5, 13});
    pairs[i + 1] = __builtin_shuffle(v[i], v[i + 1], Shuffle{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], Shuffle{0, 1, 8, 9, 4, 5, 12, 13});
      quads[i + 2 * j + 1] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], Shuffle{2, 3, 10, 11, 6, 7, 14, 15});
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shuffle(quads[i], quads[i + 4], Shuffle{0, 1, 2, 3, 8, 9, 10, 11});
    v[i + 4] = __builtin_shuffle(quads[i], quads[i + 4], Shuffle{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

}  // namespace CLICKTRAIN_ISA
