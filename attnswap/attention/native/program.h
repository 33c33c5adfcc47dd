// What a compiled swap offers the engine; program.py prints one of these for every swap.
#pragma once
#include <cstdint>
#include <type_traits>

template <typename F>
struct ProgramOf {
  std::int64_t params;  // per-head numbers: lambda and the swap's own
  bool shifted;         // scores are taken relative to a running shift
  F (*floor)(const F* p);
  F (*null)(F shift, F n, const F* p);
  F (*norm)(F s, F shift, const F* p);
  F (*norm_slope)(F s, F shift, const F* p);
  // Replaces scores by weights and returns the sum of what they add to the denominator.
  F (*weigh)(F* s, std::int64_t size, F shift, const F* p, const std::uint8_t* keep);
  // From scores and dot products dO.v makes weights / Z in `w`, and the gradients of the scores in `dot`.
  void (*slopes)(const F* s, F* dot, F* w, std::int64_t size, F shift, F inverse, F delta,
                 const F* p, const std::uint8_t* keep);
  // Adds the gradient of each per-head number to `sums`: by way of the weights, the null and the sinks.
  void (*weigh_by_param)(const F* s, const F* dot, std::int64_t size, F shift, F inverse, F delta,
                         const F* p, const std::uint8_t* keep, F* sums);
  void (*null_by_param)(F shift, F n, const F* p, F factor, F* sums);
  void (*norm_by_param)(F s, F shift, const F* p, F factor, F* sums);
  // Of row swaps alone: bounds of the threshold, and the power of the mass that is nearly linear in it.
  bool threshold;
  F (*low)(F top, F n, const F* p);
  F (*high)(F top, F n, const F* p);
  F (*power)(const F* p);
  // Gathers the scores that have weight at a threshold, and returns how many.
  std::int64_t (*candidates)(const F* s, std::int64_t size, F shift, const F* p, const std::uint8_t* keep, F* found);
  // Sums the weights, and their derivatives by the threshold.
  F (*mass)(const F* s, std::int64_t size, F shift, const F* p, F* slope);
  // As `weigh`, and writes each weight's derivative by the threshold to `slopes`.
  F (*weigh_and_slope)(F* s, F* slopes, std::int64_t size, F shift, const F* p, const std::uint8_t* keep, F* slope);
};

struct Program {
  ProgramOf<float> single;
  ProgramOf<double> exact;

  template <typename F>
  const ProgramOf<F>* of() const {
    if constexpr (std::is_same_v<F, float>)
      return &single;
    else
      return &exact;
  }
};
