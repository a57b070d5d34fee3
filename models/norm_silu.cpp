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
  float t = u * -1.44269504f;
  t = t > -126.0f ? t : -126.0f;  // written as the instructions compare, which settles what becomes of NaN
  t = t < 126.0f ? t : 126.0f;
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

// Narrow rows are taken several at a time, as one of more channels: a loop over 16 channels is hardly begun when it ends.
struct Shape {
  int64_t channels, together, rows, width;  // of `together` rows, `width` channels

  Shape(int64_t rows, int64_t channels, bool side_by_side) : channels(channels), together(1) {
    while (side_by_side && together * channels < 128 && rows % (2 * together) == 0) together *= 2;
    this->rows = rows / together;
    width = channels * together;
  }

  int64_t blocks() const { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

  std::vector<float> repeated(const float* of_channel) const {
    std::vector<float> values(width);
    for (int64_t c = 0; c < width; c++) values[c] = of_channel[c % channels];
    return values;
  }
};

// Two sums per channel and block, and their totals.
struct Sums {
  const Shape& shape;
  std::vector<float> of_block;

  explicit Sums(const Shape& shape) : shape(shape), of_block(shape.blocks() * 2 * shape.width) {}

  float* first(int64_t block) { return of_block.data() + block * 2 * shape.width; }
  float* second(int64_t block) { return first(block) + shape.width; }

  double total_first(int64_t channel) const { return total(channel); }
  double total_second(int64_t channel) const { return total(shape.width + channel); }

 private:
  double total(int64_t start) const {
    double sum = 0;
    for (int64_t block = 0; block < shape.blocks(); block++)
      for (int64_t row = 0; row < shape.together; row++)
        sum += of_block[block * 2 * shape.width + start + row * shape.channels];
    return sum;
  }
};

// What a forward pass hands to its backward pass, an array of C each.
struct Channels {
  float *scale, *shift, *mean, *inverse_std;  // normalised map = scale * map + shift
};

// Means of some rows from all over the maps: what is summed lies near 0 then, and the variance does not cancel.
template <class T>
std::vector<float> near_means(const T* maps, int64_t rows, int64_t C) {
  const int64_t looked_at = std::min<int64_t>(rows, 256);
  std::vector<float> means(C);
  for (int64_t k = 0; k < looked_at; k++)
    for (int64_t c = 0; c < C; c++) means[c] += load(maps + (rows * k / looked_at) * C + c) / looked_at;
  return means;
}

template <class T>
void forward(const T* maps, T* out, const float* weight, const float* bias, float* running_mean, float* running_var,
             Channels kept, int64_t rows, int64_t C, float eps, float momentum, int threads) {
  const Shape shape(rows, C, true);
  const int64_t width = shape.width;
  Sums sums(shape);
  const std::vector<float> pivot = near_means(maps, rows, C);
  const std::vector<float> pivots = shape.repeated(pivot.data());
  std::vector<float> scales, shifts;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < shape.blocks(); block++) {
      float *__restrict sum = sums.first(block), *__restrict squares = sums.second(block);
      const float* __restrict near = pivots.data();
      const int64_t end = std::min(shape.rows, (block + 1) * BLOCK_ROWS);
      for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
        const T* __restrict map = maps + row * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
          const float offset = load(map + c) - near[c];
          sum[c] += offset;
          squares[c] += offset * offset;
        }
      }
    }
#pragma omp single
    {
      for (int64_t c = 0; c < C; c++) {
        const double offset = sums.total_first(c) / rows;
        const double mean = offset + pivot[c], var = std::max(sums.total_second(c) / rows - offset * offset, 0.0);
        const double inverse_std = 1 / std::sqrt(var + eps), unbiased = var * rows / (rows - 1);
        running_mean[c] += momentum * (float(mean) - running_mean[c]);
        running_var[c] += momentum * (float(unbiased) - running_var[c]);
        kept.mean[c] = float(mean);
        kept.inverse_std[c] = float(inverse_std);
        kept.scale[c] = float(weight[c] * inverse_std);
        kept.shift[c] = float(bias[c] - mean * weight[c] * inverse_std);
      }
      scales = shape.repeated(kept.scale);
      shifts = shape.repeated(kept.shift);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < shape.rows; row++) {
      const T* __restrict map = maps + row * width;
      T* __restrict to = out + row * width;
      const float *__restrict scale = scales.data(), *__restrict shift = shifts.data();
#pragma omp simd
      for (int64_t c = 0; c < width; c++) {
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
  const Shape shape(rows, C, stride == C);
  const int64_t width = shape.width, step = stride * shape.together;
  Sums sums(shape);
  const std::vector<float> scales = shape.repeated(kept.scale), shifts = shape.repeated(kept.shift);
  const std::vector<float> means = shape.repeated(kept.mean);
  std::vector<float> slope(C), constant(C), slopes, constants;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < shape.blocks(); block++) {
      float *__restrict sum = sums.first(block), *__restrict products = sums.second(block);
      const float *__restrict scale = scales.data(), *__restrict shift = shifts.data(), *__restrict mean = means.data();
      const int64_t end = std::min(shape.rows, (block + 1) * BLOCK_ROWS);
      for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
        const T *__restrict map = maps + row * width, *__restrict from = gradient + row * step;
        T* __restrict to = for_maps + row * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
          const float x = load(map + c), u = x * scale[c] + shift[c], s = sigmoid(u);
          const float for_u = load(from + c) * s * (1 + u * (1 - s));
          store(to + c, for_u);
          sum[c] += for_u;
          products[c] += for_u * (x - mean[c]);
        }
      }
    }
#pragma omp single
    {
      for (int64_t c = 0; c < C; c++) {
        const double sum = sums.total_first(c), product = sums.total_second(c), inverse_std = kept.inverse_std[c];
        for_bias[c] = float(sum);
        for_weight[c] = float(product * inverse_std);
        // d/d map = scale * (for_u - mean(for_u) - normalised * mean(for_u * normalised))
        slope[c] = float(-kept.scale[c] * inverse_std * inverse_std * product / rows);
        constant[c] = float(-kept.scale[c] * sum / rows - slope[c] * kept.mean[c]);
      }
      slopes = shape.repeated(slope.data());
      constants = shape.repeated(constant.data());
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < shape.rows; row++) {
      const T* __restrict map = maps + row * width;
      T* __restrict to = for_maps + row * width;
      const float *__restrict scale = scales.data(), *__restrict along = slopes.data(), *__restrict rest = constants.data();
#pragma omp simd
      for (int64_t c = 0; c < width; c++) store(to + c, load(to + c) * scale[c] + load(map + c) * along[c] + rest[c]);
    }
  }
}

}  // namespace

// kept: scale, shift, mean and inverse standard deviation of each channel, (4, C)
#define EXPORT(SUFFIX, T)                                                                                            \
  extern "C" void forward_##SUFFIX(const void* maps, void* out, const float* weight, const float* bias,              \
                                   float* running_mean, float* running_var, float* kept, int64_t rows, int64_t C,    \
                                   float eps, float momentum, int64_t threads) {                                     \
    forward(static_cast<const T*>(maps), static_cast<T*>(out), weight, bias, running_mean, running_var,              \
            Channels{kept, kept + C, kept + 2 * C, kept + 3 * C}, rows, C, eps, momentum, int(threads));             \
  }                                                                                                                  \
  extern "C" void backward_##SUFFIX(const void* gradient, int64_t stride, const void* maps, void* for_maps,          \
                                    float* kept, float* for_weight, float* for_bias, int64_t rows, int64_t C,        \
                                    int64_t threads) {                                                               \
    backward(static_cast<const T*>(gradient), stride, static_cast<const T*>(maps), static_cast<T*>(for_maps),        \
             Channels{kept, kept + C, kept + 2 * C, kept + 3 * C}, for_weight, for_bias, rows, C, int(threads));     \
  }

EXPORT(f32, float)
EXPORT(bf16, bf16)
