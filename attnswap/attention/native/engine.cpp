// Attention with any elementwise normalizer, tile by tile, forward and backward, in memory linear in the length.
//
//   O_i = (1 / Z_i) sum_j w(s_ij; m_i) v_j,   Z_i = null_i + sum_j d(s_ij; m_i)
//   dS_ij = [w'(s_ij) (dO_i . v_j) - d'(s_ij) (dO_i . O_i)] / Z_i
//
// w and d come from a program: a small library compiled from the one definition of the swap (see program.py). Each
// row sees one range of keys [first, last), less what `keep` and `mask` hide; head h reads the keys and values of head
// kv_heads[h], or h / group size where that list is empty. Tiles run from the last key to the first, so that the
// running shift m soon knows the nearest keys, and what decay has made negligible is never read.
#include "backward.h"
#include "direct.h"
#include "few.h"
#include "forward.h"
#include "packed.h"
#include "rows.h"

namespace {

// Computes in fp32 what has no products in half precision.
template <typename Function>
auto in_float(const Tensor& query, const Tensor& key, const Tensor& value, Function&& function) {
  return function(query.to(at::kFloat), key.to(at::kFloat), value.to(at::kFloat));
}

#define NAMES                                                                                                      \
  path, query, key, value, kv_heads, first, last, keep, mask, bias, row_scale, row_bias, key_bias, sinks, params,  \
      count, scaling, softcap, tolerance, training

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_of(ARGUMENTS) {
  const bool row = program(path).single.threshold;
  if (query.scalar_type() == at::kDouble) return row ? forward_rows<double>(NAMES) : forward<double, Direct<double>>(NAMES);
  const bool few = query.size(2) <= FEW;
  if (query.scalar_type() == at::kFloat)
    return row ? forward_rows<float>(NAMES) : few ? forward_few<float, float>(NAMES) : forward<float, Direct<float>>(NAMES);
  if (!row && few) return forward_few<float, Half>(NAMES);
  if (!row && multiplies_bf16()) return forward<float, Packed>(NAMES);
  return in_float(query, key, value, [&](const Tensor& query, const Tensor& key, const Tensor& value) {
    auto [out, shifts, inverses, mean] = row ? forward_rows<float>(NAMES) : forward<float, Direct<float>>(NAMES);
    // As where bf16 is multiplied, the backward pass reads an output that is not rounded.
    return std::tuple{out.to(at::kBFloat16), shifts, inverses, row || !training ? mean : out};
  });
}

std::vector<Tensor> backward_of(const Tensor& grad, const Tensor& out, const Tensor& shifts, const Tensor& inverses,
                                at::ArrayRef<int64_t> wanted, ARGUMENTS) {
#define OWN grad, out, shifts, inverses, wanted, NAMES
  if (query.scalar_type() == at::kDouble) return backward<double, DirectBackward<double>>(OWN);
  if (query.scalar_type() == at::kFloat) return backward<float, DirectBackward<float>>(OWN);
  if (multiplies_bf16()) return backward<float, PackedBackward>(OWN);
  const Tensor &rounded_grad = grad, &rounded_out = out;
  return in_float(query, key, value, [&](const Tensor& query, const Tensor& key, const Tensor& value) {
    const Tensor grad = rounded_grad.to(at::kFloat), out = rounded_out.to(at::kFloat);
    auto found = backward<float, DirectBackward<float>>(OWN);
    for (int i = 0; i < 3; ++i) found[i] = found[i].to(at::kBFloat16);
    return found;
  });
#undef OWN
}

}  // namespace

TORCH_LIBRARY(attnswap_native, library) {
  const std::string arguments =
      "str path, Tensor query, Tensor key, Tensor value, int[] kv_heads, Tensor first, Tensor last, Tensor? keep, "
      "Tensor? mask, Tensor? bias, Tensor? row_scale, Tensor? row_bias, Tensor? key_bias, Tensor? sinks, "
      "Tensor params, Tensor? count, float scaling, float softcap, float tolerance, bool training";
  library.def(("forward(" + arguments + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  library.def(("backward(Tensor grad, Tensor out, Tensor shifts, Tensor inverses, int[] wanted, " + arguments +
               ") -> Tensor[]").c_str());
}

TORCH_LIBRARY_IMPL(attnswap_native, CPU, library) {
  library.impl("forward", forward_of);
  library.impl("backward", backward_of);
}
