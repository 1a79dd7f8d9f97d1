// Asks the launch plans of csrc/cuda which kernel serves a call, in which grid and with how much
// shared memory. Compiled for the CPU by residency.py; the kernels are named and never run.
//
// Arguments: architecture, multiprocessors, bytes of shared memory that a block may have. A line of
// input is a call, a line of output a launch: number of the call, kernel, thread blocks, threads of
// one, bytes of dynamic shared memory, blocks a multiprocessor that the grid was made for (0: the
// grid is not made for that), fewest and most stages of a warp and slots of its ring (0: no ring).
#include <cxxabi.h>

#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <typeinfo>

#include "cuda/attention_kv4_plan.h"
#include "cuda/gemv_plan.h"
#include "cuda/hadamard.cuh"
#include "cuda/kv4_plan.h"
#include "cuda/linear_w8_plan.h"
#include "cuda/quantize_plan.h"

using namespace w2a4;

namespace {

int arch, processors;
size_t most_shared;
int call_number = 0;

// Where nothing is read, any aligned address will do.
template <class T>
T* some() {
  return reinterpret_cast<T*>(uintptr_t{1} << 20);
}

struct Stages {
  int64_t least = 0, most = 0;
  int ring = 0;
};

// `kernel` is a std::integral_constant of a kernel; its demangled type has the kernel's name in it.
template <class Kernel>
void say(Kernel, uint64_t blocks, unsigned threads, size_t shared, int64_t planned = 0,
         const Stages& stages = {}) {
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, nullptr), std::free);
  std::cout << call_number << '\t' << name.get() << '\t' << blocks << '\t' << threads << '\t'
            << shared << '\t' << planned << '\t' << stages.least << '\t' << stages.most << '\t'
            << stages.ring << '\n';
}

// Chunk c of a row belongs to warp c % kWarps, see gemv.cuh.
Stages gemv_stages(const LinearA4Params& p, const cuda::GemvPlan& plan) {
  using Imma2 = cuda::Imma<2, 1, 2, false>;
  using Imma4 = cuda::Imma<4, 1, 2, false>;
  const int64_t chunk = cuda::kUnit * cuda::kUnitsInChunk;
  const int64_t chunks = (p.in_features + chunk - 1) / chunk;
  const int64_t steps = plan.bmma ? 1 : p.weight_bits == 2 ? Imma2::kSteps : Imma4::kSteps;
  const int ring = plan.bmma ? cuda::Bmma<1, false>::kStages : Imma2::kStages;
  return {chunks / cuda::kWarps * steps, (chunks + cuda::kWarps - 1) / cuda::kWarps * steps, ring};
}

void linear_a4(std::istream& in) {
  LinearA4Params p{};
  in >> p.weight_bits >> p.tokens >> p.out_features >> p.in_features >> p.group_size;
  p.act_group = p.in_features, p.block = std::min(p.group_size, p.act_group);
  p.a_codes = p.weight = some<uint8_t>(), p.levels = p.weight_bits == 2 ? some<int8_t>() : nullptr;
  const cuda::GemvPlan plan = cuda::plan_gemv(p, arch, processors, most_shared, cuda::Gemv::kAuto);
  const uint64_t blocks = uint64_t{plan.blocks_x} * plan.blocks_y * plan.blocks_z;
  cuda::with_gemv_kernel(p, plan, [&](auto kernel, const char*, size_t shared) {
    say(kernel, blocks, cuda::kThreads, shared, 0, gemv_stages(p, plan));
  });
}

void linear_w8(std::istream& in) {
  LinearW8Params p{};
  in >> p.tokens >> p.out_features >> p.in_features;
  p.weight = some<int8_t>(), p.dtype = ScalarType::Half;
  const cuda::LinearW8Plan plan = cuda::plan_linear_w8(p, processors, most_shared);
  const uint64_t blocks = uint64_t{plan.blocks_x} * plan.blocks_y;
  cuda::with_linear_w8_kernel(plan, [&](auto kernel) {
    say(kernel, blocks, cuda::kW8Warps * 32, plan.shared,
        (plan.blocks_x + processors - 1) / processors);
  });
}

// Blocks a multiprocessor of a grid that is made to fill the device, see transform_blocks.
int64_t resident(const cuda::Transform& t, unsigned blocks) {
  return blocks == t.units ? 0 : (blocks + processors - 1) / processors;
}
int64_t resident(const cuda::ClusterTransform& t, unsigned blocks) {
  return blocks == t.tokens << t.log_blocks ? 0 : (blocks + processors - 1) / processors;
}

void quantize_a4(std::istream& in) {
  QuantizeA4Params p{};
  std::string before;
  in >> before >> p.tokens >> p.features >> p.k >> p.block_size;
  p.group_size = p.features, p.dtype = ScalarType::Half;
  p.x = some<void>(), p.codes = some<uint8_t>();
  p.rmsnorm = before == "rmsnorm", p.norm_weight = p.rmsnorm ? some<void>() : nullptr;
  p.norm_dtype = p.dtype;
  p.up = before == "silu_mul" ? some<void>() : nullptr;
  p.had_k = p.k > 1 ? some<int8_t>() : nullptr;
  cuda::with_quantize(p, arch, processors, most_shared,
                      [&](auto kernel, const auto& args, const cuda::Launch& how) {
                        const int64_t planned = p.block_size > 1 ? resident(args.t, how.blocks) : 0;
                        say(kernel, how.blocks, how.threads, how.shared, planned);
                      });
}

void hadamard(std::istream& in) {
  HadamardParams p{};
  in >> p.rows >> p.n >> p.k >> p.block_size;
  p.x = p.y = some<void>(), p.had_k = p.k > 1 ? some<int8_t>() : nullptr;
  p.dtype = ScalarType::Half;
  cuda::with_hadamard(p, arch, processors, most_shared,
                      [&](auto kernel, const auto& args, const cuda::Launch& how) {
                        say(kernel, how.blocks, how.threads, how.shared,
                            resident(args.t, how.blocks));
                      });
}

Strided4 heads(int64_t heads, int64_t tokens, int64_t width) {
  return {some<void>(), heads * tokens * width, tokens * width, width};
}

void rope_append_kv4(std::istream& in) {
  RopeAppendKV4Params p{};
  in >> p.tokens >> p.q_heads >> p.kv_heads >> p.head_dim >> p.k >> p.block_size;
  p.batch = 1, p.dtype = p.rope_dtype = ScalarType::Half;
  p.qkv = p.cos = p.sin = p.q = some<void>(), p.had_k = p.k > 1 ? some<int8_t>() : nullptr;
  const auto plan = cuda::plan_rope_append_kv4(p);
  cuda::with_kv4_kernel(plan.args, [&](auto kernel) {
    say(kernel, plan.blocks, cuda::kHeadWarps * 32, plan.shared);
  });
}

void attention_kv4(std::istream& in) {
  AttentionKV4Params p{};
  in >> p.q_tokens >> p.q_heads >> p.kv_heads >> p.head_dim >> p.length;
  p.batch = 1, p.causal = true, p.dtype = ScalarType::Half;
  p.q = heads(p.q_heads, p.q_tokens, p.head_dim);
  p.k_codes = p.v_codes = heads(p.kv_heads, p.length, p.head_dim / 2);
  p.k_params = p.v_params = heads(p.kv_heads, p.length, 2);
  if (cuda::plan_attention_kv4(p, processors, most_shared).workspace) p.workspace = some<float>();
  const cuda::AttentionPlan plan = cuda::plan_attention_kv4(p, processors, most_shared);
  cuda::with_attention_kernel(plan, [&](auto kernel) {
    say(typename decltype(kernel)::type{}, uint64_t{plan.blocks_x} * plan.blocks_y,
        cuda::kAttentionThreads, plan.shared);
  });
  if (plan.args.partial)
    say(std::integral_constant<cuda::AttentionKernel, cuda::merge_kv4_kernel>{},
        uint64_t{plan.merge_x} * plan.merge_y, cuda::kAttentionThreads, cuda::kMergeShared);
}

}  // namespace

int main(int, char** argv) {
  arch = std::stoi(argv[1]), processors = std::stoi(argv[2]), most_shared = std::stoul(argv[3]);
  for (std::string line, op; std::getline(std::cin, line); ++call_number) {
    std::istringstream in(line);
    in >> op;
    try {
      op == "linear_a4"         ? linear_a4(in)
      : op == "linear_w8"       ? linear_w8(in)
      : op == "quantize_a4"     ? quantize_a4(in)
      : op == "hadamard"        ? hadamard(in)
      : op == "rope_append_kv4" ? rope_append_kv4(in)
                                : attention_kv4(in);
    } catch (const std::runtime_error& error) {
      std::cerr << line << ": " << error.what() << '\n';
      return 1;
    }
  }
}
