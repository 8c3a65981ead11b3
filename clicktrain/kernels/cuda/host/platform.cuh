// The device of `../platform.cuh` on a CPU: the threads of a block are fibers.
//
// A fiber runs until a barrier or a shuffle; which one runs next is set by the launch (forward, reverse, random; eager: a
// warp as far as it can before the next one), so that code which relies on an order fails. An asynchronous copy destroys its target at once and lands at the wait,
// so that neither a missing wait nor a buffer overwritten too early goes unseen. Shared memory starts out as NaN.
// Arrays of the caller and shared memory end or start at pages that cannot be touched: what lies outside traps.

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct half16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <typename Item, int Count>
struct alignas(sizeof(Item) * Count) Packed {
  Item items[Count];
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class Waits { no, at_barrier, in_warp, finished };
enum class Result : int { ok = 0, divergent_barrier = 1, out_of_bounds = 2, misaligned = 3 };
enum class Order : int { forward = 0, reverse = 1, random = 2, eager = 3 };

constexpr size_t kStack = 128 << 10;

struct Copy {
  uint32_t* to;
  const uint32_t* from;
  bool exists;
  unsigned batch;
};

struct Fiber {
  ucontext_t context;
  Waits waits;
  unsigned shuffles, batches;
  std::vector<Copy> copies;
};

static std::vector<Fiber> fibers;
static std::vector<float> exchanged[2];
static unsigned current;
static ucontext_t scheduler;
static unsigned char* shared_bytes;
static size_t shared_size;
static sigjmp_buf escape;
static void (*body)(void**);
static void** body_arguments;

inline void yield(Waits why) {
  fibers[current].waits = why;
  swapcontext(&fibers[current].context, &scheduler);
}

[[noreturn]] inline void fail(Result result) { siglongjmp(escape, int(result)); }

inline void trapped(int) { fail(Result::out_of_bounds); }

template <typename Item>
void check_aligned(const Item* place, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(place) % bytes) fail(Result::misaligned);
}

// Memory between pages that cannot be touched; its last byte (or its first) is next to one.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) : page_(size_t(sysconf(_SC_PAGESIZE))) {
    inner_ = (bytes + page_ - 1) / page_ * page_;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || (inner_ && mprotect(base_ + page_, inner_, PROT_READ | PROT_WRITE))) abort();
    data_ = base_ + page_ + (at_end ? inner_ - bytes : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, inner_ + 2 * page_); }
  unsigned char* data() const { return data_; }
  void forbid_writing() { mprotect(base_ + page_, inner_, PROT_READ); }

 private:
  size_t page_, inner_;
  unsigned char *base_, *data_;
};

inline void run_fiber(unsigned thread) {
  current = threadIdx.x = thread;
  swapcontext(&scheduler, &fibers[thread].context);
}

// Let the fibers of a warp go on if all of them wait for each other; returns whether they did.
inline bool release_warp(unsigned warp) {
  for (unsigned i = warp; i < warp + 32; ++i)
    if (fibers[i].waits != Waits::in_warp) return false;
  for (unsigned i = warp; i < warp + 32; ++i) fibers[i].waits = Waits::no;
  return true;
}

// Run each warp as far as it can.
inline void run_warps(unsigned threads) {
  for (unsigned warp = 0; warp < threads; warp += 32) {
    do {
      for (unsigned i = warp; i < warp + 32; ++i)
        if (fibers[i].waits == Waits::no) run_fiber(i);
    } while (release_warp(warp));
  }
}

// Run the waiting fibers of a block until all have finished.
inline Result run_block(unsigned threads, Order order, uint32_t& random) {
  std::vector<unsigned> sequence(threads);
  for (unsigned i = 0; i < threads; ++i) sequence[i] = order == Order::reverse ? threads - 1 - i : i;
  for (;;) {
    if (order == Order::random)
      for (unsigned i = threads - 1; i; --i) std::swap(sequence[i], sequence[(random = random * 1664525u + 1013904223u) / 65536 % (i + 1)]);
    bool ran = false;
    if (order == Order::eager) run_warps(threads);
    for (unsigned thread : sequence) {
      if (fibers[thread].waits != Waits::no) continue;
      ran = true;
      run_fiber(thread);
    }
    if (ran) continue;
    unsigned at_barrier = 0, finished = 0, released = 0;
    for (const Fiber& fiber : fibers) {
      at_barrier += fiber.waits == Waits::at_barrier;
      finished += fiber.waits == Waits::finished;
    }
    if (finished == threads) return Result::ok;
    if (at_barrier == threads) {
      for (Fiber& fiber : fibers) fiber.waits = Waits::no;
      continue;
    }
    for (unsigned warp = 0; warp < threads; warp += 32) released += release_warp(warp);
    if (!released) return Result::divergent_barrier;
  }
}

inline void enter() {
  body(body_arguments);
  yield(Waits::finished);
}

template <typename... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments*>(arguments[I])...);
}
template <auto kernel>
struct Entry;
template <typename... Arguments, void (*kernel)(Arguments...)>
struct Entry<kernel> {
  static void run(void** arguments) { call(kernel, arguments, std::index_sequence_for<Arguments...>{}); }
};

inline int launch(void (*entry)(void**), unsigned blocks, unsigned threads, size_t shared, int order, unsigned seed,
                  void** arguments) {
  struct sigaction mine {}, segv, bus;
  static std::vector<unsigned char> signal_stack(64 << 10);
  stack_t alternate{}, before{};
  alternate.ss_sp = signal_stack.data(), alternate.ss_size = signal_stack.size();
  sigaltstack(&alternate, &before);
  mine.sa_handler = trapped, mine.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &mine, &segv);
  sigaction(SIGBUS, &mine, &bus);

  static std::vector<unsigned char> stacks;
  stacks.resize(kStack * threads);
  fibers.resize(threads);
  for (auto& values : exchanged) values.assign(threads, 0);
  Guarded memory((shared + 15) / 16 * 16, true);
  shared_bytes = memory.data();
  shared_size = shared;
  body = entry, body_arguments = arguments;
  blockDim.x = threads, gridDim.x = blocks;
  uint32_t random = seed * 2654435761u + 1;

  volatile int result = int(Result::ok);
  if (int reason = sigsetjmp(escape, 1)) {
    result = reason;
  } else {
    for (unsigned block = 0; block < blocks && result == int(Result::ok); ++block) {
      blockIdx.x = order == int(Order::reverse) ? blocks - 1 - block : block;
      memset(shared_bytes, 0xff, shared);
      for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.waits = Waits::no, fiber.shuffles = fiber.batches = 0;
        fiber.copies.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + kStack * i;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
      }
      result = int(run_block(threads, Order(order), random));
    }
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&before, nullptr);
  return result;
}

}  // namespace host

inline void __syncthreads() { host::yield(host::Waits::at_barrier); }

inline int thread_now() { return int(threadIdx.x); }

inline unsigned char* shared_memory() { return host::shared_bytes; }

inline unsigned bits_of(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(unsigned(value.bits) << 16); }
inline float to_float(half16 value) {
  const unsigned sign = unsigned(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, low = value.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | low << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | low << 13);
  const float magnitude = float(low) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline void from_float(float value, float& narrow) { narrow = value; }
inline void from_float(float value, bfloat16& narrow) {
  const unsigned bits = bits_of(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  narrow.bits = is_nan ? 0x7fff : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float value, half16& narrow) {
  const unsigned bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    narrow.bits = 0x7fff;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    narrow.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude >= 0x38800000) {  // normal
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    narrow.bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  } else {  // subnormal: the addition rounds to a multiple of 2^-24
    narrow.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
}

template <int Count, typename Item>
Packed<Item, Count> load_packed(const Item* from) {
  host::check_aligned(from, sizeof(Packed<Item, Count>));
  Packed<Item, Count> values;
  memcpy(&values, from, sizeof values);
  return values;
}
template <typename Item, int Count>
void store_packed(Item* to, const Packed<Item, Count>& values) {
  host::check_aligned(to, sizeof values);
  memcpy(to, &values, sizeof values);
}

template <typename Word>
void copy_word(Word* to, const Word* from, bool exists) {
  auto* place = reinterpret_cast<uint32_t*>(to);
  *place = 0xffffffff;  // NaN, -1
  host::Fiber& fiber = host::fibers[host::current];
  fiber.copies.push_back({place, reinterpret_cast<const uint32_t*>(from), exists, fiber.batches});
}
inline void copy_async(float* to, const float* from, bool exists) { copy_word(to, from, exists); }
inline void copy_async(int* to, const int* from, bool exists) { copy_word(to, from, exists); }
template <typename Narrow>
void copy_async(float* to, const Narrow* from, bool exists) {
  *to = exists ? to_float(*from) : 0.0f;
}

template <typename Narrow>
void copy_async2(Narrow* to, const Narrow* from, bool exists) {
  host::check_aligned(to, 8);
  if (exists) host::check_aligned(from, 8);
  for (int i = 0; i < 2; ++i) copy_word(reinterpret_cast<int*>(to) + i, reinterpret_cast<const int*>(from) + i, exists);
}

inline void copy_async4(float* to, const float* from, bool exists) {
  host::check_aligned(to, 16);
  if (exists) host::check_aligned(from, 16);
  for (int i = 0; i < 4; ++i) copy_word(to + i, exists ? from + i : from, exists);
}
template <typename Narrow>
void copy_async4(float* to, const Narrow* from, bool exists) {
  host::check_aligned(to, 16);
  if (exists) host::check_aligned(from, 4 * sizeof(Narrow));
  for (int i = 0; i < 4; ++i) to[i] = exists ? to_float(from[i]) : 0.0f;
}

inline void wait_for_copies() {
  auto& copies = host::fibers[host::current].copies;
  for (const host::Copy& copy : copies) *copy.to = copy.exists ? *copy.from : 0;
  copies.clear();
}

template <typename Narrow>
void copy_unit(Packed<unsigned, 4>* to, const Narrow* from, bool exists) {
  host::check_aligned(to, 16);
  if (exists) host::check_aligned(from, 16);
  auto* words = reinterpret_cast<const int*>(from);
  for (int i = 0; i < 4; ++i) copy_word(reinterpret_cast<int*>(to) + i, exists ? words + i : words, exists);
}

inline void close_copies() { ++host::fibers[host::current].batches; }

// Batches land in the order in which they were closed, at the last moment.
template <unsigned Open>
void wait_for_batches() {
  host::Fiber& fiber = host::fibers[host::current];
  size_t landed = 0;
  for (const host::Copy& copy : fiber.copies) {
    if (copy.batch + Open >= fiber.batches) break;
    *copy.to = copy.exists ? *copy.from : 0;
    ++landed;
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + long(landed));
}

inline void sync_warp() { host::yield(host::Waits::in_warp); }

inline float shuffle_xor(float value, int distance) {
  const unsigned thread = host::current, turn = host::fibers[thread].shuffles++ % 2;
  host::exchanged[turn][thread] = value;
  host::yield(host::Waits::in_warp);
  return host::exchanged[turn][thread ^ unsigned(distance)];
}

namespace host {

// What a lane hands to its warp: a row of a matrix, or its parts of two factors.
struct Handed {
  uint16_t row[8];
  float a[8], b[4];
};
static std::vector<Handed> handed[2];

// Hand something to the warp; returns the turn to read the others' in, when all have handed theirs over.
inline unsigned hand(const Handed& mine) {
  const unsigned thread = current, turn = fibers[thread].shuffles++ % 2;
  for (auto& all : handed)
    if (all.size() < fibers.size()) all.resize(fibers.size());
  handed[turn][thread] = mine;
  yield(Waits::in_warp);
  return turn;
}

template <typename Narrow>
float value_of(unsigned word, int place) {
  return to_float(Narrow{uint16_t(word >> 16 * place)});
}

}  // namespace host

template <int Count, typename Narrow>
Packed<unsigned, Count> load_words(const Narrow* from) {
  host::check_aligned(from, 4 * Count);
  Packed<unsigned, Count> words;
  memcpy(&words, from, sizeof words);
  return words;
}

inline unsigned join_halves(unsigned first, unsigned second, bool upper) {
  return upper ? first >> 16 | (second & 0xffff0000) : (first & 0xffff) | second << 16;
}

inline unsigned shuffle_xor(unsigned value, int distance) {
  return bits_of(shuffle_xor(float_of(value), distance));
}

template <typename Narrow>
unsigned round_pair(float first, float second, Narrow) {
  Narrow low, high;
  from_float(first, low);
  from_float(second, high);
  return low.bits | unsigned(high.bits) << 16;
}

template <bool Transposed>
Packed<unsigned, 4> load_matrices(const Packed<unsigned, 4>* row) {
  host::check_aligned(row, 16);
  const auto* place = reinterpret_cast<const unsigned char*>(row);
  if (place < host::shared_bytes || place + 16 > host::shared_bytes + host::shared_size)
    host::fail(host::Result::out_of_bounds);
  host::Handed mine{};
  memcpy(mine.row, row, 16);
  const unsigned thread = host::current, turn = host::hand(mine);
  const auto& all = host::handed[turn];
  const unsigned warp = thread / 32 * 32, lane = thread % 32;
  Packed<unsigned, 4> found;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned line = lane / 4, column = lane % 4 * 2 + i;
      const auto& from = all[warp + matrix * 8 + (Transposed ? column : line)];
      pair[i] = from.row[Transposed ? line : column];
    }
    found.items[matrix] = pair[0] | unsigned(pair[1]) << 16;
  }
  return found;
}

// Products of 16-bit values are exact in float32; the sums are rounded one by one.
template <typename Narrow>
void multiply_accumulate(float (&sum)[4], const Packed<unsigned, 4>& a, unsigned b0, unsigned b1, Narrow) {
  host::Handed mine{};
  for (int i = 0; i < 8; ++i) mine.a[i] = host::value_of<Narrow>(a.items[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = host::value_of<Narrow>(i < 2 ? b0 : b1, i % 2);
  const unsigned thread = host::current, turn = host::hand(mine);
  const host::Handed* all = host::handed[turn].data() + thread / 32 * 32;
  const unsigned lane = thread % 32;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned column = lane % 4 * 2 + i % 2, part = k / 8, pair = k % 8 / 2;
      // Row lane / 4 (+ 8 for i >= 2) of a is with the four lanes that share lane / 4.
      const float left = all[lane / 4 * 4 + pair].a[part * 4 + i / 2 * 2 + k % 2];
      sum[i] += left * all[column * 4 + pair].b[part * 2 + k % 2];
    }
}

extern "C" void* guarded_new(size_t bytes, int at_end) { return new host::Guarded(bytes, at_end); }
extern "C" void* guarded_data(void* memory) { return static_cast<host::Guarded*>(memory)->data(); }
extern "C" void guarded_forbid_writing(void* memory) { static_cast<host::Guarded*>(memory)->forbid_writing(); }
extern "C" void guarded_delete(void* memory) { delete static_cast<host::Guarded*>(memory); }
