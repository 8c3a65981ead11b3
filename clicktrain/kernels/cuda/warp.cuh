// The sum of the lanes, in all lanes.
__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = 16; distance; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}
