// BGR to RGB in place, with hue, saturation and value times factors on the way, in one pass.
//
// The definition is OpenCV's on bytes: hue (two degrees), saturation and value are rounded to whole numbers, times the
// factors, rounded again, and the way back cuts off fractions. The loop over a block is written for the compiler to
// vectorise, and every pixel goes through it, wherever it lies, so that its result depends on nothing else.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int BLOCK = 128;
constexpr float FULL_TURN = 180.f, SECTOR = 30.f;
constexpr float JUST_ABOVE = 1e-3f;  // so that rounding errors do not turn whole numbers into the ones below

struct Planes {
  alignas(64) float blue[BLOCK], green[BLOCK], red[BLOCK];
};

inline float between_0_and_1(float value) { return std::min(std::max(value, 0.f), 1.f); }

// To the nearest whole number, ties to even: the sum has no room for fractions.
inline float whole(float value) { return (value + 12582912.f) - 12582912.f; }

inline float within_a_turn(float hue) { return hue >= FULL_TURN ? hue - FULL_TURN : hue; }

void recolour_block(const Planes& from, Planes& to, float hue_factor, float saturation_factor, float value_factor) {
  for (int i = 0; i < BLOCK; ++i) {
    const float b = from.blue[i], g = from.green[i], r = from.red[i];
    const float brightest = std::max(std::max(b, g), r);
    const float range = brightest - std::min(std::min(b, g), r);
    const float unit = SECTOR / std::max(range, 1.f);
    float hue = brightest == r   ? (g - b) * unit
                : brightest == g ? (b - r) * unit + 2 * SECTOR
                                 : (r - g) * unit + 4 * SECTOR;
    hue = within_a_turn(whole(hue < 0 ? hue + FULL_TURN : hue));
    hue = within_a_turn(whole(hue * hue_factor)) * (1.f / SECTOR);
    const float saturation = std::min(whole(whole(range * 255.f / std::max(brightest, 1.f)) * saturation_factor), 255.f);
    const float value = std::min(whole(brightest * value_factor), 255.f);
    const float reach = value * saturation * (1.f / 255.f);
    const float darkest = value - reach + JUST_ABOVE;
    to.red[i] = darkest + reach * between_0_and_1(std::abs(hue - 3.f) - 1.f);
    to.green[i] = darkest + reach * between_0_and_1(2.f - std::abs(hue - 2.f));
    to.blue[i] = darkest + reach * between_0_and_1(2.f - std::abs(hue - 4.f));
  }
}

}  // namespace

extern "C" void recolour(uint8_t* picture, int64_t rows, int64_t columns, int64_t row_bytes, float hue_factor,
                         float saturation_factor, float value_factor) {
  if (row_bytes == 3 * columns) {  // one long row has a single end
    columns *= rows;
    rows = 1;
  }
  Planes from, to;
  uint8_t rest[3 * BLOCK] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += BLOCK) {
      uint8_t* const place = picture + row * row_bytes + 3 * column;
      const int64_t count = std::min<int64_t>(BLOCK, columns - column);
      uint8_t* const pixels = count < BLOCK ? std::copy(place, place + 3 * count, rest) - 3 * count : place;
      for (int i = 0; i < BLOCK; ++i) {
        from.blue[i] = pixels[3 * i];
        from.green[i] = pixels[3 * i + 1];
        from.red[i] = pixels[3 * i + 2];
      }
      recolour_block(from, to, hue_factor, saturation_factor, value_factor);
      for (int i = 0; i < BLOCK; ++i) {
        pixels[3 * i] = static_cast<uint8_t>(static_cast<int>(to.red[i]));
        pixels[3 * i + 1] = static_cast<uint8_t>(static_cast<int>(to.green[i]));
        pixels[3 * i + 2] = static_cast<uint8_t>(static_cast<int>(to.blue[i]));
      }
      if (count < BLOCK) std::copy(rest, rest + 3 * count, place);
    }
  }
}
