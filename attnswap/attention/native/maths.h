// The vocabulary of swaps, for double, float and vectors of floats. Printed code is one template for all three: scalars
// are what tests read, vectors are what runs. The polynomials are least-squares fits, within 3e-8 of the function.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64)));
typedef std::int32_t ints __attribute__((vector_size(64)));
typedef std::uint8_t lanes_of_bytes __attribute__((vector_size(16)));

// What runs for a scalar type: sixteen floats at once, but doubles, which are for checking, one by one.
template <typename F>
using lanes_of = std::conditional_t<std::is_same_v<F, float>, floats, double>;
template <typename F>
constexpr int LANES = sizeof(lanes_of<F>) / sizeof(F);

template <typename F>
inline lanes_of<F> load(const F* x) {
  lanes_of<F> v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
template <typename F>
inline void store(F* x, lanes_of<F> v) {
  std::memcpy(x, &v, sizeof v);
}
// Which of the next lanes hold a key that is seen.
template <typename F>
inline auto load_seen(const std::uint8_t* x) {
  if constexpr (std::is_same_v<F, double>) {
    return *x != 0;
  } else {
    lanes_of_bytes v;
    std::memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, ints) != 0;
  }
}
inline double sum(double v) { return v; }
inline float sum(floats v) {
  float total = 0;
  for (int i = 0; i < LANES<float>; ++i) total += v[i];
  return total;
}
// Writes the lanes that are on next to each other, and returns how many.
inline int compress(double* to, double x, bool on) {
  *to = x;
  return on;
}
inline int compress(float* to, floats x, ints on) {
#ifdef __AVX512F__
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)on, (__m512i)on);
  _mm512_mask_compressstoreu_ps(to, mask, (__m512)x);
  return __builtin_popcount(mask);
#else
  int many = 0;
  for (int i = 0; i < LANES<float>; ++i)
    if (on[i]) to[many++] = x[i];
  return many;
#endif
}
inline double lane(double v, int) { return v; }
inline float lane(floats v, int i) { return v[i]; }

template <typename T>
inline T number(double x) {
  return T{} + static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(x);
}

inline std::int32_t bits(float x) {
  std::int32_t n;
  std::memcpy(&n, &x, sizeof n);
  return n;
}
inline float from_bits(std::int32_t n) {
  float x;
  std::memcpy(&x, &n, sizeof x);
  return x;
}
inline ints bits(floats x) { return (ints)x; }
inline floats from_bits(ints n) { return (floats)n; }
inline float count(std::int32_t n) { return float(n); }
inline floats count(ints n) { return __builtin_convertvector(n, floats); }

template <typename T>
inline T vmin(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T vmax(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
inline T vabs(T x) {
  return x < number<T>(0) ? -x : x;
}
template <typename T>
inline T vrelu(T x) {
  return x < number<T>(0) ? number<T>(0) : x;  // NaN stays NaN
}
template <typename T>
inline T vsign(T x) {
  return x > number<T>(0) ? number<T>(1) : x < number<T>(0) ? number<T>(-1) : number<T>(0);
}

// e^x, 0 below -87 (so never a subnormal number) and held at e^88 above.
template <typename T>
inline T vexp(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp(x);
  } else {
    // 2^n e^r with |r| <= ln(2) / 2; n by adding and removing 1.5 * 2^23, whose last bit counts ones.
    const T held = vmin(vmax(x, number<T>(-88)), number<T>(88));
    const T shifted = held * 1.442695041f + 12582912.f, n = shifted - 12582912.f;
    const T r = (held - n * 0.693359375f) + n * 2.12194440e-4f;
    T p = r * 0.00139295904f + 0.00835986881f;
    p = p * r + 0.0416665035f, p = p * r + 0.166665983f, p = p * r + 0.5f;
    p = (p * (r * r) + r) + 1.f;
    return x > number<T>(-87) ? from_bits(bits(p) + (bits(shifted) << 23)) : x != x ? x : number<T>(0);
  }
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <typename T>
inline T vlog1p_near_0(T f) {
  T p = f * -0.0751439766f + 0.126044503f;
  p = p * f - 0.131325088f, p = p * f + 0.142220335f, p = p * f - 0.166280091f;
  p = p * f + 0.200004595f, p = p * f - 0.250006826f, p = p * f + 0.333333402f;
  return f + (p * f - 0.5f) * (f * f);
}

template <typename T>
inline T vlog(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::log(x);
  } else {
    const auto offset = bits(x) - 0x3f3504f3;  // sqrt(1/2)
    const T n = count(offset >> 23), f = from_bits((offset & 0x7fffff) + 0x3f3504f3) - 1.f;
    const T y = n * 0.693359375f + (n * -2.12194440e-4f + vlog1p_near_0(f));
    const T infinity = number<T>(INFINITY);
    const T high = x < infinity ? y : infinity, low = x < number<T>(0) ? number<T>(NAN) : -infinity;
    return x > number<T>(0) ? high : x != x ? x : low;
  }
}

template <typename T>
inline T vlog1p(T u) {
  if constexpr (std::is_same_v<T, double>) {
    return std::log1p(u);
  } else {
    const T far = vlog(u + 1.f), near = vlog1p_near_0(vmax(vmin(u, number<T>(0.4142)), number<T>(-0.2928)));
    return u > number<T>(-0.2928) ? (u < number<T>(0.4142) ? near : far) : far;
  }
}

template <typename T>
inline T vtanh(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::tanh(x);
  } else {
    const T a = vabs(x), u = x * x, e = vexp(a * -2.f), far = (1.f - e) / (1.f + e);
    T p = u * -0.00581000576f + 0.0207311508f;
    p = p * u - 0.0537672085f, p = p * u + 0.133317605f, p = p * u - 0.333332931f;
    return a < number<T>(0.625) ? (p * u) * x + x : x < number<T>(0) ? -far : far;
  }
}

template <typename T>
inline T vpow(T x, T p) {
  if constexpr (std::is_same_v<T, double>)
    return std::pow(x, p);
  else
    return x > number<T>(0) ? vexp(p * vlog(x)) : p != number<T>(0) ? number<T>(0) : number<T>(1);
}

template <typename T>
inline T vsigmoid(T x) {
  return number<T>(1) / (number<T>(1) + vexp(-x));
}

template <typename T>
inline T vsoftplus(T x) {
  return vrelu(x) + vlog1p(vexp(-vabs(x)));
}
