"""The C++ of one swap, in the form the engine loads: whole rows at a time, sixteen keys at once."""

import hashlib
from functools import cache
from pathlib import Path

from attnswap.attention.codegen import cpp, parameters, solved, trace
from attnswap.swaps.base import Swap

HERE = Path(__file__).parent

ROWS = """
// Subnormal numbers are slow in products, and nothing this small is seen beside its row's largest weight.
template <typename V>
inline V flush(V w) {{
  return vabs(w) < number<V>(1e-30) ? V{{}} : w;
}}

template <typename F>
F row_floor(const F* p) {{
  {scalars}
  return {floor};
}}
template <typename F>
F row_null(F shift, F n, const F* p) {{
  {scalars}
  return null<F>(0, shift, n{p});
}}
template <typename F>
F row_norm(F s, F shift, const F* p) {{
  {scalars}
  return norm<F>(s, shift, 0{p});
}}
template <typename F>
F row_norm_slope(F s, F shift, const F* p) {{
  {scalars}
  return norm_slope<F>(s, shift, 0{p});
}}

// Calls `each(first, size)` for the keys of a row, lanes by lanes; the last may be fewer.
template <typename F, typename Each>
inline void by_lanes(std::int64_t size, Each&& each) {{
  std::int64_t j = 0;
  for (; j + LANES<F> <= size; j += LANES<F>) each(j, LANES<F>);
  if (j < size) each(j, int(size - j));
}}

template <typename F>
inline lanes_of<F> load_some(const F* x, int size) {{
  if (size == LANES<F>) return load(x);
  lanes_of<F> v{{}};
  std::memcpy(&v, x, size * sizeof(F));
  return v;
}}
template <typename F>
inline void store_some(F* x, lanes_of<F> v, int size) {{
  if (size == LANES<F>) return store(x, v);
  std::memcpy(x, &v, size * sizeof(F));
}}
// Which lanes hold a key that is seen, if `masked` is asked for and of the first `size`.
template <typename F, bool masked>
inline auto seen(const std::uint8_t* keep, int size) {{
  if (masked && size == LANES<F>) return load_seen<F>(keep);
  std::uint8_t on[LANES<F>] = {{}};
  for (int i = 0; i < size; ++i) on[i] = !masked || keep[i];
  return load_seen<F>(on);
}}

template <typename F, bool masked>
F weigh_row(F* s, std::int64_t size, F row_shift, const F* p, const std::uint8_t* keep) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  V total{{}};
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes), w = weight<V>(x, shift, n{p}), d = norm<V>(x, shift, n{p});
    if (!masked && lanes == LANES<F>) {{
      store(s + j, flush(w)), total += d;
    }} else {{
      const auto on = seen<F, masked>(keep + j, lanes);
      store_some(s + j, on ? flush(w) : V{{}}, lanes), total += on ? d : V{{}};
    }}
  }});
  return sum(total);
}}

template <typename F>
F weigh(F* s, std::int64_t size, F shift, const F* p, const std::uint8_t* keep) {{
  return keep ? weigh_row<F, true>(s, size, shift, p, keep) : weigh_row<F, false>(s, size, shift, p, keep);
}}

template <typename F, bool masked>
void slope_row(const F* s, F* dot, F* w, std::int64_t size, F row_shift, F inverse, F delta,
               const F* p, const std::uint8_t* keep) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes), g = load_some(dot + j, lanes);
    const V own = flush(weight<V>(x, shift, n{p}) * inverse);
    const V slope =
        flush((weight_slope<V>(x, shift, n{p}) * g - norm_slope<V>(x, shift, n{p}) * delta) * inverse);
    if (!masked && lanes == LANES<F>) {{
      store(w + j, own), store(dot + j, slope);
    }} else {{
      const auto on = seen<F, masked>(keep + j, lanes);
      store_some(w + j, on ? own : V{{}}, lanes), store_some(dot + j, on ? slope : V{{}}, lanes);
    }}
  }});
}}

template <typename F>
void slopes(const F* s, F* dot, F* w, std::int64_t size, F shift, F inverse, F delta,
            const F* p, const std::uint8_t* keep) {{
  keep ? slope_row<F, true>(s, dot, w, size, shift, inverse, delta, p, keep)
       : slope_row<F, false>(s, dot, w, size, shift, inverse, delta, p, keep);
}}

template <typename F>
void weigh_by_param(const F* s, const F* dot, std::int64_t size, F row_shift, F inverse, F delta,
                    const F* p, const std::uint8_t* keep, F* sums) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  V totals[{count}]{{}};
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes), g = load_some(dot + j, lanes);
    const auto on = keep ? seen<F, true>(keep + j, lanes) : seen<F, false>(keep, lanes);
{weigh_by}
  }});
  for (int i = 0; i < {count}; ++i) sums[i] += sum(totals[i]) * inverse;
}}

template <typename F>
void null_by_param(F shift, F n, const F* p, F factor, F* sums) {{
  {scalars}
{null_by}
}}

template <typename F>
void norm_by_param(F s, F shift, const F* p, F factor, F* sums) {{
  {scalars}
{norm_by}
}}
"""


THRESHOLD = """
template <typename F>
F row_low(F top, F n, const F* p) {{
  {scalars}
  return low<F>(top, 0, n{p});
}}
template <typename F>
F row_high(F top, F n, const F* p) {{
  {scalars}
  return high<F>(top, 0, n{p});
}}
template <typename F>
F row_power(const F* p) {{
  {scalars}
  return power<F>(0, 0, 0{p});
}}

template <typename F>
std::int64_t candidates(const F* s, std::int64_t size, F row_shift, const F* p, const std::uint8_t* keep, F* found) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  std::int64_t many = 0;
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes);
    const auto on = keep ? seen<F, true>(keep + j, lanes) : seen<F, false>(nullptr, lanes);
    many += compress(found + many, x, on & (weight<V>(x, shift, n{p}) > V{{}}));
  }});
  return many;
}}

template <typename F>
F mass(const F* s, std::int64_t size, F row_shift, const F* p, F* slope) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  V total{{}}, slopes{{}};
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes);
    const auto on = seen<F, false>(nullptr, lanes);
    total += on ? weight<V>(x, shift, n{p}) : V{{}};
    slopes += on ? weight_by_shift<V>(x, shift, n{p}) : V{{}};
  }});
  *slope = sum(slopes);
  return sum(total);
}}

template <typename F>
F weigh_and_slope(F* s, F* slopes, std::int64_t size, F row_shift, const F* p, const std::uint8_t* keep, F* slope) {{
  using V = lanes_of<F>;
  {vectors}
  const V shift = V{{}} + row_shift, n{{}};
  V total{{}}, falling{{}};
  by_lanes<F>(size, [&](std::int64_t j, int lanes) {{
    const V x = load_some(s + j, lanes);
    const auto on = keep ? seen<F, true>(keep + j, lanes) : seen<F, false>(nullptr, lanes);
    const V w = on ? flush(weight<V>(x, shift, n{p})) : V{{}}, g = on ? weight_by_shift<V>(x, shift, n{p}) : V{{}};
    store_some(s + j, w, lanes), store_some(slopes + j, g, lanes);
    total += w, falling += g;
  }});
  *slope = sum(falling);
  return sum(total);
}}
"""


@cache
def source(swap: Swap, whole: bool) -> str:
    """Returns the translation unit of a swap, as the engine wants it (``program.h``).

    Args:
        swap: The swap.
        whole: Print it for lambda 1 alone.
    """
    names = parameters(swap)
    # With an underscore, since a swap may call a parameter what a variable here is called.
    p = "".join(f", {name}_" for name in names)

    def each(form: str) -> str:
        return "\n".join("    " + form.format(i=i, name=name, p=p) for i, name in enumerate(names))

    scalars = " ".join(f"[[maybe_unused]] const F {name}_ = p[{i}];" for i, name in enumerate(names))
    vectors = " ".join(f"[[maybe_unused]] const V {name}_ = V{{}} + p[{i}];" for i, name in enumerate(names))
    rows = ROWS.format(
        p=p,
        count=len(names),
        scalars=scalars,
        vectors=vectors,
        floor=f"floor<F>(0, 0, 0{p})" if "floor" in trace(swap, whole) else "-F(INFINITY)",
        weigh_by=each(
            "totals[{i}] += on ? weight_by_{name}<V>(x, shift, n{p}) * g"
            " - norm_by_{name}<V>(x, shift, n{p}) * delta : V{{}};"
        ),
        null_by=each("sums[{i}] += factor * null_by_{name}<F>(0, shift, n{p});"),
        norm_by=each("sums[{i}] += factor * norm_by_{name}<F>(s, shift, 0{p});"),
    )
    functions = ["row_floor", "row_null", "row_norm", "row_norm_slope", "weigh", "slopes"]
    functions += ["weigh_by_param", "null_by_param", "norm_by_param"]
    own = ["row_low", "row_high", "row_power", "candidates", "mass", "weigh_and_slope"] if solved(swap) else []
    rows += THRESHOLD.format(p=p, scalars=scalars, vectors=vectors) if solved(swap) else ""

    def entries(kind: str) -> str:
        ours, rest = ([f"{f}<{kind}>" for f in group] for group in (functions, own))
        flags = ["true" if flag else "false" for flag in (swap.shifted, solved(swap) is not None)]
        return f"{{{', '.join([str(len(names)), flags[0], *ours, flags[1], *(rest or ['nullptr'] * 6)])}}}"

    table = ", ".join(entries(kind) for kind in ("float", "double"))
    return (
        f'#include "maths.h"\n#include "program.h"\n\nnamespace {{\n\n{cpp(swap, whole)}{rows}\n}}  // namespace\n\n'
        f'extern "C" const Program attnswap_program;\nconst Program attnswap_program = {{{table}}};\n'
    )


def digest(*texts: str) -> str:
    """Returns a short name for what is compiled."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def headers() -> str:
    """Returns the texts that every compiled swap depends on."""
    return "".join((HERE / name).read_text() for name in ("maths.h", "program.h"))
