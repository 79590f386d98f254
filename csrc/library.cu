// The library's functions; what they take is in abi.h. Each returns 0, or a status whose reason `dfa_message` tells.
//
// A host compiler makes of this file, as C++, a library that runs the same kernels on the CPU.
#include "kernels.cuh"

#include <cstdio>

#ifndef DFA_ARCHITECTURES
#define DFA_ARCHITECTURES host  // or sm_75+compute_75+…, what setup.py asks nvcc for
#endif
#define DFA_TEXT(name) #name
#define DFA_TEXT_OF(macro) DFA_TEXT(macro)
#define DFA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using dfa::Arguments;

thread_local char message[256];

enum Status { OK, WRONG_ARGUMENT, FAILED_LAUNCH };

int refused(const char* what, long long got) {
  std::snprintf(message, sizeof message, "%s: got %lld", what, got);
  return WRONG_ARGUMENT;
}

// Where and in which order kernels run: a device by its number, and a stream of it.
struct Where {
  int device;
  void* stream;
};

#ifdef __CUDACC__
// Lets a kernel have as much shared memory as the device gives to any: another thread's launch may need more than this.
template <class Kernel>
cudaError_t allow(Kernel kernel, int device) {
  int most = 0;
  cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes own;
  status = cudaFuncGetAttributes(&own, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess || own.maxDynamicSharedSizeBytes >= most - static_cast<int>(own.sharedSizeBytes)) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(own.sharedSizeBytes));
}
#endif

// Starts a kernel of 1-d blocks.
template <class... Given>
int start(const char* name, void (*kernel)(Given...), long long programs, int threads, size_t shared, Where where,
          Given... given) {
  if (programs == 0) return OK;
  if (programs < 0 || programs > 0x7fffffff) return refused(name, programs);
#ifdef __CUDACC__
  constexpr size_t WITHOUT_ASKING = 48 * 1024;
  void* addresses[] = {&given...};
  // The caller has made it the current one, but by another copy of the runtime.
  cudaError_t status = cudaSetDevice(where.device);
  if (status == cudaSuccess && shared > WITHOUT_ASKING) status = allow(kernel, where.device);
  if (status == cudaSuccess) {
    dim3 grid(static_cast<unsigned>(programs)), block(threads);
    status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared,
                              static_cast<cudaStream_t>(where.stream));
  }
  if (status == cudaSuccess) return OK;
  cudaGetLastError();  // the next call shall not find it
  std::snprintf(message, sizeof message, "%s: %s", name, cudaGetErrorString(status));
  return FAILED_LAUNCH;
#else
  (void)where;
  bool ended = dfa::Emulator::instance().run(static_cast<int>(programs), threads, shared, [=] { kernel(given...); });
  return ended ? OK : refused("threads of a block wait at different barriers, in the kernel of programs", programs);
#endif
}

// Of a strip's programs; the longest layer's decide.
template <class T>
size_t strip_bytes(const Arguments& a) {
  typedef dfa::StripShape<T> Shape;
  int positions = 1;
  for (int i = 0; i < a.layers; ++i) positions = a.layer[i].positions > positions ? a.layer[i].positions : positions;
  return size_t(Shape::depth(a.rows * positions)) * Shape::PITCH * sizeof(T) + Shape::SCRATCH;
}

size_t strip_bytes(const Arguments& a) {
  return a.dtype == dfa::FLOAT32 ? strip_bytes<float>(a) : strip_bytes<dfa::Half>(a);
}

int run_strip(const Arguments& a, Where where) {
  auto kernel = a.dtype == dfa::FLOAT32   ? dfa_strip_float32
                : a.dtype == dfa::FLOAT16 ? dfa_strip_float16
                                          : dfa_strip_bfloat16;
  return start("dfa_strip", kernel, a.programs, dfa::DELTA_THREADS, strip_bytes(a), where, a);
}

int run_deltas(const Arguments& a, Where where) {
  return start("dfa_deltas", dfa_deltas, dfa::delta_programs(a), dfa::DELTA_THREADS, dfa::DELTAS_SHARED, where, a);
}

int run_wide(const Arguments& a, Where where) {
  if (int status = run_deltas(a, where)) return status;
  if (a.dtype == dfa::FLOAT32) {
    typedef dfa::WideShape<float> Shape;
    return start("dfa_product", dfa_product_float32, a.programs, Shape::THREADS, Shape::SHARED, where, a);
  }
  typedef dfa::WideShape<dfa::Half> Shape;
  auto kernel = a.dtype == dfa::FLOAT16 ? dfa_product_float16 : dfa_product_bfloat16;
  return start("dfa_product", kernel, a.programs, Shape::THREADS, Shape::SHARED, where, a);
}

}  // namespace

DFA_EXPORT int dfa_abi_version() { return DFA_ABI_VERSION; }
DFA_EXPORT long long dfa_arguments_bytes() { return sizeof(Arguments); }
DFA_EXPORT const char* dfa_architectures() { return DFA_TEXT_OF(DFA_ARCHITECTURES); }

// Why the last call on this thread that did not return 0 failed.
DFA_EXPORT const char* dfa_message() { return message; }

// Shared memory that a program takes if the task is STRIP.
DFA_EXPORT long long dfa_strip_bytes(const Arguments* a) { return static_cast<long long>(strip_bytes(*a)); }

DFA_EXPORT int dfa_run(const Arguments* a, int device, void* stream) {
  Where where = {device, stream};
  if (a->layers < 0 || a->layers > dfa::MOST_LAYERS) return refused("layers", a->layers);
  switch (a->task) {
    case dfa::STRIP:
      return run_strip(*a, where);
    case dfa::WIDE:
      return run_wide(*a, where);
    case dfa::TAPS:
      return run_deltas(*a, where);
    default:
      return refused("task", a->task);
  }
}

// `count` numbers of the host to the device's memory; they are read before it returns.
DFA_EXPORT int dfa_write_numbers(float* to, const float* from, int count, int device, void* stream) {
  if (count < 0 || count > dfa::MOST_NUMBERS) return refused("count", count);
  dfa::Numbers numbers;
  for (int i = 0; i < count; ++i) numbers.values[i] = from[i];
  return start("dfa_write", dfa_write, count > 0, 128, 0, {device, stream}, to, numbers, count);
}
