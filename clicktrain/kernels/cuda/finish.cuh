// Add up what the splits found, `words` each, and round once. A warp adds every eighth of them, for 32 values; one adds
// the warps' sums. `places` says where each kernel's sums lie, `pitch` words apart; null: by its number.
extern "C" __global__ void __launch_bounds__(256)
    finish(const float* partial, Element* dvalues, const int* places, int count, int entries, int pitch, int words,
           int splits) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * 32 + lane;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int place = !places || i >= count ? i : places[i / entries] * pitch + i % entries;
  float total = 0.0f;
  if (i < count)
#pragma unroll 8
    for (int split = warp; split < splits; split += 8) total += partial[split * words + place];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp || i >= count) return;
#pragma unroll
  for (int other = 1; other < 8; ++other) total += sums[other * 32 + lane];
  from_float(total, dvalues[i]);
}
