/* A stub CUDA device: what ONNX Runtime's CUDA provider calls to load graphs and to run its part of the work on the host.
 *
 * stub_cuda.py compiles this source once for each library that the provider needs (libcudart, libcublas, libcudnn ...), together with a
 * file that defines every other function the provider imports as one that returns 0, which is success. "Device" memory is memory of the
 * host, so copies are real and are counted. A kernel that is launched is counted by its name and computes nothing.
 * No headers of CUDA are needed. DRIVER is the version that the driver reports, LAYOUT_13 is defined for CUDA 13's cudaDeviceProp.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define KERNELS (1 << 17)
#define LAUNCHED (1 << 12)
#define OUT_OF_MEMORY 2

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char handle[4096]; /* every stream, event, descriptor and context */
static struct { const void *function; const char *name; } kernels[KERNELS];
static const char *launched[LAUNCHED];
static long number_of_kernels, number_of_launches, copied[5], held, most, largest;
static long memory = 24L << 30;
static int device_fault, launch_fault, launch_fault_in, last_error;

/* What stub_cuda.py calls. */

void stub_reset(void) { number_of_launches = most = largest = 0; memset(copied, 0, sizeof copied); }
void stub_memory(long bytes) { memory = bytes; }
void stub_device_fault(int code) { device_fault = code; }
void stub_launch_fault(int code, int after) { launch_fault = code; launch_fault_in = after; last_error = 0; }
long stub_copied(int kind) { return copied[kind]; } /* 1: to the device, 2: to the host, 3: on the device */
long stub_largest(void) { return largest; } /* bytes of the largest allocation */
const char *stub_launched(int i) { return i < number_of_launches && i < LAUNCHED ? launched[i] : NULL; }

/* Devices and versions. */

int cudaDriverGetVersion(int *version) { *version = DRIVER; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = DRIVER; return 0; }
size_t cudnnGetVersion(void) { return 91000; }
int cudaGetDeviceCount(int *count) { *count = 1; return device_fault; }
int cudaSetDevice(int device) { (void)device; return device_fault; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int size, int device) { (void)size; (void)device; strcpy(name, "stub GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = memory; return 0; }
int cudaMemGetInfo(size_t *left, size_t *total) { *left = memory - held; *total = memory; return 0; }

#define MULTIPROCESSORS 82 /* an RTX 3090 */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 16 ? MULTIPROCESSORS : 1024;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }

static void put(char *properties, int offset, int value) { memcpy(properties + offset, &value, sizeof value); }
static void put_size(char *properties, int offset, size_t value) { memcpy(properties + offset, &value, sizeof value); }

#ifdef LAYOUT_13 /* offsets of struct cudaDeviceProp in driver_types.h */
#define GET_PROPERTIES cudaGetDeviceProperties
enum { BYTES = 1008, PROCESSORS = 384, L2 = 596, THREADS = 604, SHARED = 624, REGISTERS = 632, OPTIN = 672 };
#else
#define GET_PROPERTIES cudaGetDeviceProperties_v2
enum { BYTES = 1032, PROCESSORS = 388, L2 = 616, THREADS = 624, SHARED = 640, REGISTERS = 648, OPTIN = 696 };
#endif
int GET_PROPERTIES(char *properties, int device) {
  (void)device;
  memset(properties, 0, BYTES);
  strcpy(properties, "stub GPU");
  put_size(properties, 288, memory);
  put_size(properties, 296, 48 << 10); /* shared memory of a block */
  put(properties, 304, 1 << 16);       /* registers of a block */
  put(properties, 308, 32);            /* warp */
  put(properties, 320, 1024);          /* threads of a block, then its largest sides, then those of a grid */
  put(properties, 324, 1024), put(properties, 328, 1024), put(properties, 332, 64);
  put(properties, 336, 2147483647), put(properties, 340, 65535), put(properties, 344, 65535);
  put(properties, 360, 8), put(properties, 364, 6); /* sm86 */
  put(properties, PROCESSORS, MULTIPROCESSORS);
  put(properties, L2, 6 << 20);
  put(properties, THREADS, 1536);
  put_size(properties, SHARED, 100 << 10);
  put(properties, REGISTERS, 1 << 16);
  put_size(properties, OPTIN, 99 << 10);
  return 0;
}

static const struct { int code; const char *name, *text; } errors[] = {
    {0, "cudaSuccess", "no error"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {35, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {46, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
};
#define COUNT(array) (sizeof array / sizeof *array)
const char *cudaGetErrorName(int code) {
  for (size_t i = 0; i < COUNT(errors); i++) if (errors[i].code == code) return errors[i].name;
  return "unknown";
}
const char *cudaGetErrorString(int code) {
  for (size_t i = 0; i < COUNT(errors); i++) if (errors[i].code == code) return errors[i].text;
  return "unknown";
}
const char *cudnnGetErrorString(int code) { (void)code; return "unknown"; }

/* Memory. Each block is preceded by where it was allocated and by its size. It is zero, and takes no pages of the host until it is written. */

#define ALIGNMENT 256
static int allocate(char **block, size_t bytes, int on_device) {
  char *whole;
  pthread_mutex_lock(&lock);
  int full = on_device && held + (long)bytes > memory;
  if (!full && on_device) {
    held += bytes;
    if (held > most) most = held;
    if ((long)bytes > largest) largest = bytes;
  }
  pthread_mutex_unlock(&lock);
  if (full || !(whole = calloc(1, bytes + 2 * ALIGNMENT))) return OUT_OF_MEMORY;
  *block = whole + 2 * ALIGNMENT - (size_t)whole % ALIGNMENT;
  put_size(*block, -16, (size_t)whole), put_size(*block, -8, on_device ? bytes : 0);
  return 0;
}
static int release(char *block) {
  char *whole;
  size_t bytes;
  if (!block) return 0;
  memcpy(&whole, block - 16, sizeof whole), memcpy(&bytes, block - 8, sizeof bytes);
  pthread_mutex_lock(&lock);
  held -= bytes;
  pthread_mutex_unlock(&lock);
  free(whole);
  return 0;
}
int cudaMalloc(char **block, size_t bytes) { return device_fault ? device_fault : allocate(block, bytes, 1); }
int cudaMallocHost(char **block, size_t bytes) { return allocate(block, bytes, 0); }
int cudaHostAlloc(char **block, size_t bytes, unsigned flags) { (void)flags; return allocate(block, bytes, 0); }
int cudaFree(char *block) { return release(block); }
int cudaFreeHost(char *block) { return release(block); }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  pthread_mutex_lock(&lock);
  copied[kind] += bytes;
  pthread_mutex_unlock(&lock);
  memmove(to, from, bytes);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { (void)stream; return cudaMemcpy(to, from, bytes, kind); }
int cudaMemset(void *block, int value, size_t bytes) { memset(block, value, bytes); return 0; }
int cudaMemsetAsync(void *block, int value, size_t bytes, void *stream) { (void)stream; return cudaMemset(block, value, bytes); }

/* Kernels. */

void __cudaRegisterFunction(void **binary, const void *function, char *device_function, const char *name) {
  (void)binary; (void)device_function;
  if (number_of_kernels < KERNELS) kernels[number_of_kernels].function = function, kernels[number_of_kernels++].name = name;
}
static int launch(const void *function) {
  pthread_mutex_lock(&lock);
  const char *name = "unknown";
  for (long i = 0; i < number_of_kernels; i++) if (kernels[i].function == function) name = kernels[i].name;
  if (number_of_launches < LAUNCHED) launched[number_of_launches] = name;
  number_of_launches++;
  if (launch_fault && launch_fault_in-- <= 0) last_error = launch_fault;
  int code = last_error;
  pthread_mutex_unlock(&lock);
  return code;
}
int cudaGetLastError(void) { return last_error; }
int cudaPeekAtLastError(void) { return last_error; }
int cudaStreamSynchronize(void *stream) { (void)stream; return last_error; }
int cudaDeviceSynchronize(void) { return last_error ? last_error : device_fault; }
int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
int __cudaLaunchKernel(const void *kernel) { return launch(kernel); }
int cudaLaunchKernel(const void *function) { return launch(function); }
int cudaLaunchCooperativeKernel(const void *function) { return launch(function); }
int cudaLaunchKernelExC(const void *settings, const void *function) { (void)settings; return launch(function); }

/* Handles. */

#define CREATES(function) int function(void **created) { *created = handle; return 0; }
CREATES(cudaStreamCreate) CREATES(cudaStreamCreateWithFlags) CREATES(cudaEventCreate) CREATES(cudaEventCreateWithFlags)
CREATES(cublasCreate_v2) CREATES(cublasLtCreate) CREATES(cudnnCreate)
void *__cudaRegisterFatBinary(void *binary) { (void)binary; return handle; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long flags, int *status) {
  (void)name; (void)version; (void)flags;
  *function = NULL;
  if (status) *status = 1; /* not found */
  return 0;
}

/* cuDNN's graphs: every query for engines finds one, of which every number is 0. */

enum { INT64 = 3, DESCRIPTOR = 15, BOOLEAN = 2, DOUBLE = 5, POINTER = 6 };
int cudnnBackendCreateDescriptor(int type, void **created) { (void)type; *created = handle; return 0; }
int cudnnBackendGetAttribute(void *of, int attribute, int type, int64_t wanted, int64_t *found, void *values) {
  (void)of; (void)attribute;
  if (found) *found = type == DESCRIPTOR || type == INT64;
  if (values && wanted > 0 && type != DESCRIPTOR) memset(values, 0, type == BOOLEAN ? 1 : type == INT64 || type == DOUBLE || type == POINTER ? 8 : 4);
  return 0;
}
