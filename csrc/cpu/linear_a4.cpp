// linear_w2a4, linear_w3a4 and linear_w4a4: the choice of a kernel and its scratch memory.
#include "linear_a4.h"

#include <algorithm>

#include "arch.h"
#include "kernels.h"

namespace w2a4::cpu {
namespace {

// Products of one thread that are worth waking another: about ten microseconds of work.
constexpr int64_t kGrain = 1 << 18;

const LinearA4Kernels* kernels() {
#ifdef W2A4_X86
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return &kLinearA4Avx512Vnni;
#ifdef W2A4_AVXVNNI
    case Isa::kAvxVnni:
      return &kLinearA4AvxVnni;
#endif
    case Isa::kAvx2:
    case Isa::kAvx512:
      return &kLinearA4Avx2;
    default:
      return nullptr;
  }
#else
  return nullptr;
#endif
}

// How rows are cut into cells.
RowsTask rows_task(const LinearA4Params& p) {
  const int64_t in_byte = codes_in_byte(p), vector = kVectorBytes * in_byte;
  const int64_t groups_in_vector = p.levels && p.group_size < vector ? vector / p.group_size : 1;
  RowsTask task{};
  task.p = &p;
  task.groups = p.in_features / p.group_size;
  task.blocks = p.in_features / p.block;
  const bool even_groups = !p.levels || p.group_size == vector / 4 || p.group_size == vector / 2 ||
                           p.group_size % vector == 0;
  if (even_groups && (p.block == vector / 4 || p.block == vector / 2)) {
    task.cell_blocks = vector / p.block;
    task.cell_bytes = kVectorBytes;
    task.cell_vectors = 1;
    task.spread = groups_in_vector == 4 ? 2 : groups_in_vector == 2 ? 1 : 0;
  } else {
    task.cell_blocks = 1;
    task.cell_bytes = ceil_div(p.block, in_byte);
    task.cell_vectors = ceil_div(task.cell_bytes, kVectorBytes);
  }
  task.cells = ceil_div(p.in_features, task.cell_blocks * p.block);
  task.padded_blocks = task.cells * task.cell_blocks + 8;
  return task;
}

void run_rows(const LinearA4Params& p, const LinearA4Kernels& kernels) {
  RowsTask task = rows_task(p);
  const int64_t vector = kVectorBytes * codes_in_byte(p);
  const auto a = aligned<int8_t>(p.tokens * task.cells * task.cell_vectors * vector);
  const auto bias = aligned<int32_t>(p.tokens * task.padded_blocks);
  const auto a_scale = aligned<float>(p.tokens * task.padded_blocks);
  const auto cell_group = aligned<int64_t>(task.cells);
  for (int64_t cell = 0; cell < task.cells; ++cell)
    cell_group[cell] = cell * task.cell_blocks * p.block / p.group_size;
  task.a = a.get();
  task.bias = bias.get();
  task.a_scale = a_scale.get();
  task.cell_group = cell_group.get();
  kernels.prepare_rows(task, 0, p.tokens);
  parallel(ceil_div(p.out_features, 8), 1 + kGrain / 8 / p.in_features, task, kernels.rows);
}

void run_panels(const LinearA4Params& p, const LinearA4Kernels& kernels) {
  const int64_t unit = kUnitBytes * codes_in_byte(p), blocks = p.in_features / p.block;
  const int64_t block_units = ceil_div(p.block, unit), depth = blocks * block_units * unit;
  const int64_t most =
      std::min(p.tokens, std::max(kPanelTokens, kScratch / depth / kPanelTokens * kPanelTokens));
  const auto a = aligned<int8_t>(most * depth);
  const auto bias = aligned<int32_t>(most * blocks);
  const auto a_scale = aligned<float>(most * blocks);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const PanelsTask task{&p,           first,   std::min(most, p.tokens - first),
                          block_units,  a.get(), bias.get(),
                          a_scale.get()};
    parallel(task.tokens, 1 + kGrain / 8 / p.in_features, task, kernels.prepare_panels);
    const int64_t items =
        ceil_div(p.out_features, kernels.panel_outs) * ceil_div(task.tokens, kPanelTokens);
    if (task.tokens * p.in_features * p.out_features < kGrain)
      kernels.panels(task, 0, items);
    else
      parallel_dynamic(items, task, kernels.panels);
  }
}

}  // namespace

void linear_a4(const LinearA4Params& p) {
  if (p.tokens == 0 || p.out_features == 0) return;
  const LinearA4Kernels* kernels = cpu::kernels();
  if (!kernels)
    linear_a4_base(p);
  else
    p.tokens <= kFewTokens&& by_bytes(p) ? run_rows(p, *kernels) : run_panels(p, *kernels);
  if (p.residual) add({p.residual, p.y, p.out_dtype, p.tokens * p.out_features});
}

}  // namespace w2a4::cpu
