// Attention with any elementwise normalizer, tile by tile, forward and backward, in memory linear in the length.
//
//   O_i = (1 / Z_i) sum_j w(s_ij; m_i) v_j,   Z_i = null_i + sum_j d(s_ij; m_i)
//   dS_ij = [w'(s_ij) (dO_i . v_j) - d'(s_ij) (dO_i . O_i)] / Z_i
//
// w and d come from a program: a small library compiled from the one definition of the swap (see program.py). Each
// row sees one range of keys [first, last), less what `keep` and `mask` hide. Tiles run from the last key to the
// first, so that the running shift m soon knows the nearest keys, and what decay has made negligible is never read.
#include "backward.h"
#include "forward.h"
#include "rows.h"

namespace {

// Calls the form for a tensor's own type.
#define DISPATCH(function, ...) \
  return query.scalar_type() == at::kDouble ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__)
#define NAMES                                                                                                      \
  path, query, key, value, first, last, keep, mask, bias, row_scale, row_bias, key_bias, sinks, params, count,     \
      scaling, softcap, tolerance, training

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_of(ARGUMENTS) {
  if (program(path).single.threshold) DISPATCH(forward_rows, NAMES);
  DISPATCH(forward, NAMES);
}

std::vector<Tensor> backward_of(const Tensor& grad, const Tensor& out, const Tensor& shifts, const Tensor& inverses,
                                at::ArrayRef<int64_t> wanted, ARGUMENTS) {
  DISPATCH(backward, grad, out, shifts, inverses, wanted, NAMES);
}

}  // namespace

TORCH_LIBRARY(attnswap_native, library) {
  const std::string arguments =
      "str path, Tensor query, Tensor key, Tensor value, Tensor first, Tensor last, Tensor? keep, Tensor? mask, "
      "Tensor? bias, Tensor? row_scale, Tensor? row_bias, Tensor? key_bias, Tensor? sinks, Tensor params, "
      "Tensor? count, float scaling, float softcap, float tolerance, bool training";
  library.def(("forward(" + arguments + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  library.def(("backward(Tensor grad, Tensor out, Tensor shifts, Tensor inverses, int[] wanted, " + arguments +
               ") -> Tensor[]").c_str());
}

TORCH_LIBRARY_IMPL(attnswap_native, CPU, library) {
  library.impl("forward", forward_of);
  library.impl("backward", backward_of);
}
