// Batch normalisation and SiLU in one, forward and backward, over channels-last maps: rows of C channels, one per pixel.
//
// torch goes over the maps five times forward and seven times backward; this goes twice each. Sums are taken over blocks of
// rows whose size is fixed, and blocks are added up in double, so the result does not depend on the number of threads.
// Loops over channels are written for the compiler to vectorise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK_ROWS = 256;

struct bf16 {
  uint16_t bits;
};

inline float load(const float* from) { return *from; }

inline float load(const bf16* from) {
  const uint32_t bits = uint32_t(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* to, float value) { *to = value; }

inline void store(bf16* to, float value) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 1 / (1 + 2^t), t = -u / ln 2; the Taylor series of 2^f on [-1/2, 1/2] is good to a unit in the last place of a float.
inline float sigmoid(float u) {
  const float t = std::min(std::max(u * -1.44269504f, -126.0f), 126.0f);
  const float whole = std::nearbyint(t), f = t - whole;
  float power = 1.5403530e-4f;
  power = power * f + 1.3333558e-3f;
  power = power * f + 9.6181291e-3f;
  power = power * f + 5.5504109e-2f;
  power = power * f + 2.4022651e-1f;
  power = power * f + 6.9314718e-1f;
  power = power * f + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &power, sizeof bits);
  bits += int32_t(whole) << 23;
  std::memcpy(&power, &bits, sizeof power);
  return 1.0f / (1.0f + power);
}

// Two sums per channel and block, and their totals.
struct Sums {
  int64_t channels, blocks;
  std::vector<float> of_block;

  Sums(int64_t rows, int64_t channels)
      : channels(channels), blocks((rows + BLOCK_ROWS - 1) / BLOCK_ROWS), of_block(blocks * 2 * channels) {}

  float* first(int64_t block) { return of_block.data() + block * 2 * channels; }
  float* second(int64_t block) { return first(block) + channels; }

  double total(int64_t channel) const {
    double sum = 0;
    for (int64_t at = channel; at < int64_t(of_block.size()); at += 2 * channels) sum += of_block[at];
    return sum;
  }
};

// What a forward pass hands to its backward pass, an array of C each.
struct Channels {
  float *scale, *shift, *mean, *inverse_std;  // normalised map = scale * map + shift
};

template <class T>
void forward(const T* maps, T* out, const float* weight, const float* bias, float* running_mean, float* running_var,
             Channels kept, int64_t rows, int64_t C, float eps, float momentum, int threads) {
  Sums sums(rows, C);
  std::vector<float> pivot(C);  // any value of the channel keeps the variance from cancelling
  for (int64_t c = 0; c < C; c++) pivot[c] = load(maps + c);
  const float* __restrict near = pivot.data();

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < sums.blocks; block++) {
      float *__restrict sum = sums.first(block), *__restrict squares = sums.second(block);
      const int64_t end = std::min(rows, (block + 1) * BLOCK_ROWS);
      int64_t row = block * BLOCK_ROWS;
      for (; row + 4 <= end; row += 4) {
        const T* __restrict map = maps + row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          const float a = load(map + c) - near[c], b = load(map + C + c) - near[c];
          const float d = load(map + 2 * C + c) - near[c], e = load(map + 3 * C + c) - near[c];
          sum[c] += (a + b) + (d + e);
          squares[c] += (a * a + b * b) + (d * d + e * e);
        }
      }
      for (; row < end; row++) {
        const T* __restrict map = maps + row * C;
        for (int64_t c = 0; c < C; c++) {
          const float a = load(map + c) - near[c];
          sum[c] += a;
          squares[c] += a * a;
        }
      }
    }
#pragma omp single
    for (int64_t c = 0; c < C; c++) {
      const double offset = sums.total(c) / rows;
      const double mean = offset + pivot[c], var = std::max(sums.total(C + c) / rows - offset * offset, 0.0);
      const double inverse_std = 1 / std::sqrt(var + eps), unbiased = var * rows / (rows - 1);
      running_mean[c] += momentum * (float(mean) - running_mean[c]);
      running_var[c] += momentum * (float(unbiased) - running_var[c]);
      kept.mean[c] = float(mean);
      kept.inverse_std[c] = float(inverse_std);
      kept.scale[c] = float(weight[c] * inverse_std);
      kept.shift[c] = float(bias[c] - mean * weight[c] * inverse_std);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const T* __restrict map = maps + row * C;
      T* __restrict to = out + row * C;
      const float *__restrict scale = kept.scale, *__restrict shift = kept.shift;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        const float u = load(map + c) * scale[c] + shift[c];
        store(to + c, u * sigmoid(u));
      }
    }
  }
}

// The gradient of the output lies in rows of `stride` channels: behind a concatenation it is a part of wider rows.
template <class T>
void backward(const T* gradient, int64_t stride, const T* maps, T* for_maps, Channels kept, float* for_weight,
              float* for_bias, int64_t rows, int64_t C, int threads) {
  Sums sums(rows, C);
  std::vector<float> per_map(C), constant(C);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < sums.blocks; block++) {
      float *__restrict sum = sums.first(block), *__restrict products = sums.second(block);
      const float *__restrict scale = kept.scale, *__restrict shift = kept.shift, *__restrict mean = kept.mean;
      const int64_t end = std::min(rows, (block + 1) * BLOCK_ROWS);
      for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
        const T *__restrict map = maps + row * C, *__restrict from = gradient + row * stride;
        T* __restrict to = for_maps + row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          const float x = load(map + c), u = x * scale[c] + shift[c], s = sigmoid(u);
          const float for_u = load(from + c) * s * (1 + u * (1 - s));
          store(to + c, for_u);
          sum[c] += for_u;
          products[c] += for_u * (x - mean[c]);
        }
      }
    }
#pragma omp single
    for (int64_t c = 0; c < C; c++) {
      const double sum = sums.total(c), product = sums.total(C + c), inverse_std = kept.inverse_std[c];
      for_bias[c] = float(sum);
      for_weight[c] = float(product * inverse_std);
      // d/d map = scale * (for_u - mean(for_u) - normalised * mean(for_u * normalised))
      const double slope = -kept.scale[c] * inverse_std * inverse_std * product / rows;
      per_map[c] = float(slope);
      constant[c] = float(-kept.scale[c] * sum / rows - slope * kept.mean[c]);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const T* __restrict map = maps + row * C;
      T* __restrict to = for_maps + row * C;
      const float *__restrict scale = kept.scale, *__restrict slope = per_map.data(), *__restrict rest = constant.data();
#pragma omp simd
      for (int64_t c = 0; c < C; c++) store(to + c, load(to + c) * scale[c] + load(map + c) * slope[c] + rest[c]);
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                            \
  extern "C" void forward_##SUFFIX(const void* maps, void* out, const float* weight, const float* bias,              \
                                   float* running_mean, float* running_var, float* kept, int64_t rows, int64_t C,    \
                                   float eps, float momentum, int64_t threads) {                                         \
    forward(static_cast<const T*>(maps), static_cast<T*>(out), weight, bias, running_mean, running_var,              \
            Channels{kept, kept + C, kept + 2 * C, kept + 3 * C}, rows, C, eps, momentum, threads);                  \
  }                                                                                                                  \
  extern "C" void backward_##SUFFIX(const void* gradient, int64_t stride, const void* maps, void* for_maps,          \
                                    float* kept, float* for_weight, float* for_bias, int64_t rows, int64_t C,        \
                                    int64_t threads) {                                                                 \
    backward(static_cast<const T*>(gradient), stride, static_cast<const T*>(maps), static_cast<T*>(for_maps),        \
             Channels{kept, kept + C, kept + 2 * C, kept + 3 * C}, for_weight, for_bias, rows, C, threads);          \
  }

EXPORT(f32, float)
EXPORT(bf16, bf16)
