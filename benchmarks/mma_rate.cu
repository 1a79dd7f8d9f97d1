// Rates of the instructions that the kernels are built of, the memory's bandwidth, the cost of a
// launch in a graph, and whether tensor-core fragments lie as the PTX ISA says. Prints JSON. Run by
// mma_rate.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

#define CHECK(call)                                                        \
  do {                                                                     \
    const cudaError_t status = (call);                                     \
    if (status != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status)); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// ---- instructions: each has kWords words of A and B in a row, and what one product of words is

struct BinaryK128 {
  static constexpr const char* kName = "mma.m16n8k128.b1.and.popc";
  static constexpr int kWords = 4;
  __device__ static void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
  static int product(uint32_t a, uint32_t b) { return __builtin_popcount(a & b); }
};

struct BinaryK256 {
  static constexpr const char* kName = "mma.m16n8k256.b1.and.popc";
  static constexpr int kWords = 8;
  __device__ static void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static int product(uint32_t a, uint32_t b) { return __builtin_popcount(a & b); }
};

struct Int8K32 {
  static constexpr const char* kName = "mma.m16n8k32.s8";
  static constexpr int kWords = 8;
  __device__ static void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static int product(uint32_t a, uint32_t b) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8)
      sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
  }
};

struct Prmt {
  static constexpr const char* kName = "prmt";
  __device__ static void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(d[0]) : "r"(a[0]), "r"(b[0]));
  }
};

struct Dp4a {
  static constexpr const char* kName = "dp4a";
  __device__ static void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(d[0]) : "r"(a[0]), "r"(b[0]));
  }
};

// ---- rates

constexpr int kChains = 8, kIterations = 2048, kThreads = 512;

template <class Op>
__global__ void rate_kernel(const uint32_t* words, int32_t* out, long long* cycles) {
  const uint32_t a[4] = {words[threadIdx.x], words[threadIdx.x + 1], words[threadIdx.x + 2],
                         words[threadIdx.x + 3]};
  const uint32_t b[2] = {words[threadIdx.x + 4], words[threadIdx.x + 5]};
  int32_t sums[kChains][4] = {};  // chains that do not wait for one another
  __syncthreads();
  const long long start = clock64();
#pragma unroll 4
  for (int i = 0; i < kIterations; ++i) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) Op::run(sums[chain], a, b);
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  int32_t all = 0;
  for (int chain = 0; chain < kChains; ++chain)
    for (int i = 0; i < 4; ++i) all ^= sums[chain][i];
  out[blockIdx.x * kThreads + threadIdx.x] = all;
}

float milliseconds(cudaEvent_t start, cudaEvent_t stop) {
  CHECK(cudaEventRecord(stop));
  CHECK(cudaEventSynchronize(stop));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, start, stop));
  return ms;
}

template <class Run>
double median_ms(const Run& run) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> samples;
  for (int i = 0; i < 23; ++i) {
    CHECK(cudaEventRecord(start));
    run();
    const float ms = milliseconds(start, stop);
    if (i >= 3) samples.push_back(ms);
  }
  CHECK(cudaGetLastError());
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

struct Buffers {
  uint32_t* words;
  int32_t* out;
  long long* cycles;
};

template <class Op>
void print_rate(int processors, const Buffers& buffers, const char* end) {
  const double ms = median_ms([&] {
    rate_kernel<Op><<<processors, kThreads>>>(buffers.words, buffers.out, buffers.cycles);
  });
  std::vector<long long> cycles(processors);
  CHECK(cudaMemcpy(cycles.data(), buffers.cycles, processors * sizeof(long long),
                   cudaMemcpyDeviceToHost));
  std::nth_element(cycles.begin(), cycles.begin() + processors / 2, cycles.end());
  const double warps =
      double{kThreads} / 32 * kChains * kIterations;  // instructions of a multiprocessor
  std::printf("    \"%s\": {\"per_second\": %.6g, \"per_clock_and_multiprocessor\": %.4f}%s\n",
              Op::kName, warps * processors / ms * 1e3, warps / cycles[processors / 2], end);
}

// ---- fragments

// Word w of row r of A is register r / 8 + w / 4 * 2 of lane r % 8 * 4 + w % 4, word w of column c
// of B register w / 4 of lane c * 4 + w % 4, element (r, c) of D register r / 8 * 2 + c % 2 of lane
// r % 8 * 4 + c / 2.
template <class Op>
__global__ void layout_kernel(const uint32_t* a_words, const uint32_t* b_words, int32_t* out) {
  const int group = threadIdx.x / 4, q = threadIdx.x % 4;
  uint32_t a[4] = {}, b[2] = {};
  for (int half = 0; half < Op::kWords / 4; ++half) {
    for (int upper = 0; upper < 2; ++upper)
      a[upper + half * 2] = a_words[(group + upper * 8) * Op::kWords + half * 4 + q];
    b[half] = b_words[group * Op::kWords + half * 4 + q];
  }
  int32_t d[4] = {};
  Op::run(d, a, b);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + q * 2 + i % 2] = d[i];
}

template <class Op>
bool layout_holds() {
  std::vector<uint32_t> a(16 * Op::kWords), b(8 * Op::kWords);
  uint32_t state = 12345;
  const auto next = [&] { return state = state * 1664525u + 1013904223u, state ^ state >> 15; };
  for (auto& word : a) word = next();
  for (auto& word : b) word = next();
  uint32_t *a_device, *b_device;
  int32_t* d_device;
  std::vector<int32_t> d(16 * 8, -1);
  CHECK(cudaMalloc(&a_device, a.size() * 4));
  CHECK(cudaMalloc(&b_device, b.size() * 4));
  CHECK(cudaMalloc(&d_device, d.size() * 4));
  CHECK(cudaMemcpy(a_device, a.data(), a.size() * 4, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(b_device, b.data(), b.size() * 4, cudaMemcpyHostToDevice));
  layout_kernel<Op><<<1, 32>>>(a_device, b_device, d_device);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(d.data(), d_device, d.size() * 4, cudaMemcpyDeviceToHost));
  bool holds = true;
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int w = 0; w < Op::kWords; ++w)
        sum += Op::product(a[row * Op::kWords + w], b[column * Op::kWords + w]);
      holds = holds && d[row * 8 + column] == sum;
    }
  CHECK(cudaFree(a_device));
  CHECK(cudaFree(b_device));
  CHECK(cudaFree(d_device));
  return holds;
}

// ---- memory and launches

__global__ void read_kernel(const uint4* data, int64_t count, uint32_t* out) {
  uint32_t all = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (all == 0x12345678u) *out = all;  // the data is not known to the compiler
}

__global__ void fill_kernel(uint32_t* data, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    data[i] = x ^ x >> 13;
  }
}

__global__ void empty_kernel() {}

void print_memory(int processors) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  void *from, *to;
  CHECK(cudaMalloc(&from, kBytes));
  CHECK(cudaMalloc(&to, kBytes));
  fill_kernel<<<processors * 8, 256>>>(static_cast<uint32_t*>(from), kBytes / 4);
  const double copy =
      median_ms([&] { CHECK(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice)); });
  const double read = median_ms([&] {
    read_kernel<<<processors * 8, 256>>>(static_cast<const uint4*>(from), kBytes / 16,
                                         static_cast<uint32_t*>(to));
  });
  std::printf("  \"copy_gbps\": %.1f,\n  \"read_gbps\": %.1f,\n", 2 * kBytes / copy / 1e6,
              kBytes / read / 1e6);
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
}

void print_launch() {
  constexpr int kLaunches = 1000;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&instance, graph, 0));
  const double ms = median_ms([&] { CHECK(cudaGraphLaunch(instance, nullptr)); });
  std::printf("  \"launch_us\": %.3f,\n", ms * 1e3 / kLaunches);
  CHECK(cudaGraphExecDestroy(instance));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

const char* truth(bool holds) {
  return holds ? "true" : "false";
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int processors = device.multiProcessorCount;
  Buffers buffers;
  CHECK(cudaMalloc(&buffers.words, (kThreads + 8) * 4));
  CHECK(cudaMalloc(&buffers.out, processors * kThreads * 4));
  CHECK(cudaMalloc(&buffers.cycles, processors * sizeof(long long)));
  fill_kernel<<<4, 256>>>(buffers.words, kThreads + 8);
  std::printf(
      "{\n  \"device\": \"%s\",\n  \"arch\": %d,\n  \"multiprocessors\": %d,\n  \"l2_bytes\": "
      "%d,\n",
      device.name, device.major * 10 + device.minor, processors, device.l2CacheSize);
  std::printf("  \"rates\": {\n");
  print_rate<BinaryK128>(processors, buffers, ",");
  print_rate<BinaryK256>(processors, buffers, ",");
  print_rate<Int8K32>(processors, buffers, ",");
  print_rate<Prmt>(processors, buffers, ",");
  print_rate<Dp4a>(processors, buffers, "");
  std::printf("  },\n");
  print_memory(processors);
  print_launch();
  std::printf("  \"layouts\": {\"%s\": %s, \"%s\": %s, \"%s\": %s}\n}\n", BinaryK128::kName,
              truth(layout_holds<BinaryK128>()), BinaryK256::kName,
              truth(layout_holds<BinaryK256>()), Int8K32::kName, truth(layout_holds<Int8K32>()));
  return 0;
}
