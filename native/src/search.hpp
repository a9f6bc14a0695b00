// The path of least distortion and rate through a trellis, for rows whose errors feed forward.
//
// Each state keeps the path that reached it and the errors that path made, so that a path is judged
// by what its errors do to the columns after them. src/tersor/methods/search.py says the same in
// Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common.hpp"
#include "threads.hpp"

namespace tersor {

constexpr int kMostStates = 64, kLanes = 16;

struct Search {
  size_t rows, columns;
  const float* levels;     // (rows, columns), weights in units of their step
  const float* feedback;   // (columns, columns), how errors of earlier columns move a later one
  const float* weights;    // (columns), of a squared error
  const float* row_feedback;  // (rows, rows), the same for rows; or null
  const float* row_weights;   // (rows)
  const uint8_t* classes;  // (rows, columns), rows of `bits` / 2
  const float* bits;       // (classes * 2, magnitudes): of a code by class, z and magnitude
  size_t magnitudes;
  const uint8_t* zeros;    // (rows, columns), not 0 where only code 0 is allowed; or null
  int states, feedback_tap, driven_tap;
  float rate;              // of one bit, in units of a weighted squared error
};

// A sum in one fixed order, whatever the width of the processor's registers.
inline float dot(const float* a, const float* b, size_t count) {
  float lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += a[i] * b[i];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

class RowSearch {
 public:
  explicit RowSearch(const Search& task)
      : task_(task), width_((task.columns + kLanes) / kLanes * kLanes) {
    size_t states = static_cast<size_t>(task.states);
    for (auto& errors : errors_) errors.assign(task.feedback ? states * width_ : 0, 0.0f);
    steps_.resize(task.columns * states);
  }

  // levels: of this row, what earlier rows did to it included
  double find(size_t row, const float* levels, int32_t* codes) {
    std::fill(cost_, cost_ + task_.states, kNever);
    cost_[0] = 0;
    for (size_t column = 0; column < task_.columns; ++column) advance(row, column, levels[column]);
    int state = static_cast<int>(std::min_element(cost_, cost_ + task_.states) - cost_);
    double least = cost_[state];
    for (size_t column = task_.columns; column-- > 0;) {
      const Step& step = steps_[column * static_cast<size_t>(task_.states) + state];
      codes[column] = step.code;
      state = step.from;
    }
    return least;
  }

 private:
  struct Step {
    int32_t code;
    int32_t from;
  };

  static constexpr double kNever = std::numeric_limits<double>::infinity();

  // The four codes beside a level, and zero: two of each parity for the distortion, smaller ones
  // for the rate.
  void advance(size_t row, size_t column, float own) {
    const Search& t = task_;
    float weight = t.weights[column] * t.row_weights[row];
    size_t place = row * t.columns + column;
    std::fill(next_, next_ + t.states, kNever);
    for (int state = 0; state < t.states; ++state) {
      if (cost_[state] == kNever) continue;
      float level = own;
      if (t.feedback) {
        level -= dot(&errors_[now_][state * width_], t.feedback + column * t.columns, column);
      }
      int z = t.states > 1 ? state & 1 : 0;
      const float* bits = t.bits + (size_t{t.classes[place]} * 2 + z) * t.magnitudes;
      if (t.zeros && t.zeros[place]) {
        offer(state, z, level, 0, weight, bits);
        continue;
      }
      float size = std::min(std::fabs(level), 1e9f);
      int below = static_cast<int>(t.states > 1 ? (size + z) / 2 : size);
      for (int code = std::max(0, below - 2); code <= below + 1; ++code) {
        offer(state, z, level, code, weight, bits);
      }
      if (below > 2) offer(state, z, level, 0, weight, bits);
    }
    keep(column);
  }

  void offer(int state, int z, float level, int code, float weight, const float* bits) {
    const Search& t = task_;
    int point = t.states > 1 ? 2 * code - (code > 0 ? z : 0) : code;
    float error = std::fabs(level) - static_cast<float>(point);
    size_t last = t.magnitudes - 1, at = std::min<size_t>(static_cast<size_t>(code), last);
    float rate = bits[at];
    if (static_cast<size_t>(code) > last) {
      rate += 2 * std::log2(static_cast<float>(code - static_cast<int>(last) + 1));
    }
    double cost = cost_[state] + weight * error * error + t.rate * rate;
    int to = (state >> 1) ^ (state & 1 ? t.feedback_tap : 0) ^ (code & 1 ? t.driven_tap : 0);
    if (t.states == 1) to = 0;
    if (!(cost < next_[to])) return;
    next_[to] = cost;
    chosen_[to] = {level < 0 ? -code : code, state};
    error_[to] = level < 0 ? -error : error;
  }

  void keep(size_t column) {
    size_t states = static_cast<size_t>(task_.states);
    for (size_t state = 0; state < states; ++state) {
      if (next_[state] == kNever) continue;
      steps_[column * states + state] = chosen_[state];
      if (!task_.feedback) continue;
      float* to = &errors_[1 - now_][state * width_];
      const float* from = &errors_[now_][static_cast<size_t>(chosen_[state].from) * width_];
      std::memcpy(to, from, column * sizeof(float));
      to[column] = error_[state];
    }
    now_ = 1 - now_;
    std::copy(next_, next_ + states, cost_);
  }

  const Search& task_;
  size_t width_;
  std::vector<float> errors_[2];
  std::vector<Step> steps_;
  double cost_[kMostStates], next_[kMostStates];
  Step chosen_[kMostStates];
  float error_[kMostStates];
  int now_ = 0;
};

// Points of a row of codes.
inline void walk(const Search& task, const int32_t* codes, int32_t* points) {
  int state = 0;
  for (size_t i = 0; i < task.columns; ++i) {
    int code = codes[i], z = task.states > 1 ? state & 1 : 0;
    points[i] = task.states > 1 ? 2 * code - (code > 0 ? z : code < 0 ? -z : 0) : code;
    state = (state >> 1) ^ (state & 1 ? task.feedback_tap : 0) ^ (code & 1 ? task.driven_tap : 0);
    if (task.states == 1) state = 0;
  }
}

// Each row as the errors of the rows before it leave it; one after another, on one thread.
inline void search_in_order(const Search& task, int32_t* codes, double* costs) {
  RowSearch search(task);
  std::vector<float> errors(task.rows * task.columns), levels(task.columns);
  std::vector<int32_t> points(task.columns);
  for (size_t row = 0; row < task.rows; ++row) {
    const float* own = task.levels + row * task.columns;
    std::copy(own, own + task.columns, levels.begin());
    for (size_t before = 0; before < row; ++before) {
      float share = task.row_feedback[row * task.rows + before];
      if (share == 0) continue;
      const float* error = &errors[before * task.columns];
      for (size_t i = 0; i < task.columns; ++i) levels[i] -= share * error[i];
    }
    int32_t* found = codes + row * task.columns;
    costs[row] = search.find(row, levels.data(), found);
    walk(task, found, points.data());
    float* error = &errors[row * task.columns];
    for (size_t i = 0; i < task.columns; ++i) error[i] = levels[i] - static_cast<float>(points[i]);
  }
}

// Fills codes (rows, columns) and costs (rows); threads change nothing in them.
inline void search_rows(const Search& task, int32_t* codes, double* costs, size_t threads) {
  if (task.row_feedback) return search_in_order(task, codes, costs);
  in_threads(task.rows, threads, [&](size_t first, size_t last) {
    RowSearch search(task);
    for (size_t row = first; row < last; ++row) {
      size_t at = row * task.columns;
      costs[row] = search.find(row, task.levels + at, codes + at);
    }
  });
}

}  // namespace tersor
