// Greedy suppression among the candidates of one image, best first.
//
// Survivors lie class by class, so that a candidate meets those of its class alone, in a loop for the compiler to
// vectorise; and the last candidates are not looked at once enough have survived. Everything is float64, in the order of
// operations that torchvision has, and the compiler must keep to it (-ffp-contract=off): the two agree to the last bit.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 32;  // survivors between two looks at whether the candidate has fallen

struct Boxes {
  std::vector<double> left, top, right, bottom, area;

  explicit Boxes(int64_t count) : left(count), top(count), right(count), bottom(count), area(count) {}
};

bool overlaps(const Boxes& survivors, int64_t first, int64_t end, const double* box, double own_area, double iou) {
  for (int64_t start = first; start < end; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, end);
    int64_t fallen = 0;
    for (int64_t i = start; i < stop; ++i) {
      const double left = survivors.left[i] > box[0] ? survivors.left[i] : box[0];
      const double top = survivors.top[i] > box[1] ? survivors.top[i] : box[1];
      const double right = survivors.right[i] < box[2] ? survivors.right[i] : box[2];
      const double bottom = survivors.bottom[i] < box[3] ? survivors.bottom[i] : box[3];
      const double width = right - left > 0. ? right - left : 0.;
      const double height = bottom - top > 0. ? bottom - top : 0.;
      const double inter = width * height;
      fallen |= inter / (survivors.area[i] + own_area - inter) > iou;
    }
    if (fallen) return true;
  }
  return false;
}

}  // namespace

extern "C" {

// boxes (count, 4) xyxy and classes (count,), 0 <= class < num_classes; the survivors' indices go to `kept`, ascending.
// Returns how many there are, `most` at most.
int64_t suppress(const double* boxes, const int64_t* classes, int64_t count, int64_t num_classes, double iou,
                 int64_t most, int64_t* kept) {
  std::vector<int64_t> first(num_classes + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++first[classes[i] + 1];
  for (int64_t c = 0; c < num_classes; ++c) first[c + 1] += first[c];
  std::vector<int64_t> end(first.begin(), first.end() - 1);

  Boxes survivors(count);
  int64_t found = 0;
  for (int64_t i = 0; i < count && found < most; ++i) {
    const double* box = boxes + 4 * i;
    const double area = (box[2] - box[0]) * (box[3] - box[1]);
    int64_t& place = end[classes[i]];
    if (overlaps(survivors, first[classes[i]], place, box, area, iou)) continue;
    survivors.left[place] = box[0];
    survivors.top[place] = box[1];
    survivors.right[place] = box[2];
    survivors.bottom[place] = box[3];
    survivors.area[place] = area;
    ++place;
    kept[found++] = i;
  }
  return found;
}

}
