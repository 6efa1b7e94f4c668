/* A stub GPU: what ONNX Runtime's TensorRT-RTX provider has to find before it compiles for a GPU that this machine does not have.
 *
 * One source, compiled twice (stub_gpu.py), once under each of the driver's two sonames that the provider links: libcuda.so.1 and
 * libnvidia-ml.so.1. It has
 *   1. the driver's functions that the provider imports; each returns that there is no device;
 *   2. the functions of the CUDA runtime that the provider calls before it compiles; they report one GPU of MAJOR.MINOR;
 *   3. an ONNX Runtime provider library that wraps NVIDIA's own (PROVIDER) and shows it that GPU, since ONNX Runtime finds none.
 * Nothing can run on such a GPU. It is enough for nv_target_sm, with which the provider compiles without further queries to the device.
 * No headers of CUDA or ONNX Runtime are needed; their declarations that it uses are here.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* 1. The driver. Every function returns CUDA_ERROR_NO_DEVICE. NVML has the same number for an error that does not matter here. */

#define NO_DEVICE 100
#define ABSENT(function) int function(void) { return NO_DEVICE; }

ABSENT(cuCtxCreate_v4) ABSENT(cuCtxDestroy_v2) ABSENT(cuCtxGetCurrent) ABSENT(cuCtxPopCurrent_v2) ABSENT(cuCtxPushCurrent_v2)
ABSENT(cuCtxSetCurrent) ABSENT(cuDestroyExternalMemory) ABSENT(cuDestroyExternalSemaphore) ABSENT(cuExternalMemoryGetMappedBuffer)
ABSENT(cuFuncSetAttribute) ABSENT(cuGetErrorName) ABSENT(cuGetErrorString) ABSENT(cuImportExternalMemory) ABSENT(cuImportExternalSemaphore)
ABSENT(cuInit) ABSENT(cuLaunchKernel) ABSENT(cuModuleGetFunction) ABSENT(cuModuleLoadData) ABSENT(cuModuleUnload)
ABSENT(cuSignalExternalSemaphoresAsync) ABSENT(cuStreamGetCtx) ABSENT(cuWaitExternalSemaphoresAsync)
ABSENT(nvmlInit_v2) ABSENT(nvmlShutdown) ABSENT(nvmlSystemGetDriverVersion)
const char *nvmlErrorString(int error) { (void)error; return "no device"; }

/* 2. The CUDA runtime. struct cudaDeviceProp is that of CUDA 13's driver_types.h: 1008 bytes; these fields are read. */

#define PROPERTIES_BYTES 1008
#define PROPERTIES_MAJOR 360
#define PROPERTIES_MINOR 364
#define NAME "stub GPU"
static int pool;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDeviceGetByPCIBusId(int *device, const char *bus_id) { (void)bus_id; *device = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { (void)attribute; (void)device; *value = 0; return 0; }
int cudaMemPoolCreate(void **created, const void *properties) { (void)properties; *created = &pool; return 0; }
int cudaMemPoolSetAttribute(void *of, int attribute, void *value) { (void)of; (void)attribute; (void)value; return 0; }
int cudaMemPoolDestroy(void *destroyed) { (void)destroyed; return 0; }
int cudaGetDeviceProperties(char *properties, int device) {
  const int major = MAJOR, minor = MINOR;
  (void)device;
  memset(properties, 0, PROPERTIES_BYTES);
  memcpy(properties, NAME, sizeof NAME);
  memcpy(properties + PROPERTIES_MAJOR, &major, sizeof major);
  memcpy(properties + PROPERTIES_MINOR, &minor, sizeof minor);
  return 0;
}

/* 3. The provider. ONNX Runtime's tables of functions grow only at the end: the indices are those of its headers
 * onnxruntime_c_api.h (OrtApi) and onnxruntime_ep_c_api.h (OrtEpApi, OrtEpFactory) since 1.24. A status of NULL is success. */

#define ORT_VERSION 24
#define ORT_CREATE_STATUS 0
#define ORT_CREATE_KEY_VALUE_PAIRS 295
#define ORT_ADD_KEY_VALUE_PAIR 296
#define ORT_GET_EP_API 317
#define EP_CREATE_HARDWARE_DEVICE 16
#define ORT_FAIL 1
#define DEVICE_TYPE_GPU 1
#define VENDOR_NVIDIA 0x10de

typedef void *Status;
typedef void (*Function)(void);
typedef struct { const Function *(*get_api)(uint32_t version); } OrtApiBase;
typedef struct OrtEpFactory OrtEpFactory;
typedef Status (*GetSupportedDevices)(OrtEpFactory *, const void *const *devices, size_t count, void **found, size_t most, size_t *number);
struct OrtEpFactory {
  uint32_t ort_version_supported;
  Function get_name, get_vendor;
  GetSupportedDevices get_supported_devices;
};
typedef Status (*CreateFactories)(const char *, const OrtApiBase *, const void *, OrtEpFactory **, size_t, size_t *);
typedef Status (*ReleaseFactory)(OrtEpFactory *);

static void *library, *stub;
static GetSupportedDevices theirs;

static Status only_the_stub(OrtEpFactory *factory, const void *const *devices, size_t count, void **found, size_t most, size_t *number) {
  (void)devices; (void)count;
  return theirs(factory, (const void *const *)&stub, 1, found, most, number);
}

Status CreateEpFactories(const char *name, const OrtApiBase *base, const void *logger, OrtEpFactory **factories, size_t most, size_t *number) {
  const Function *api = base->get_api(ORT_VERSION);
  const Function *ep_api = ((const Function *(*)(void))api[ORT_GET_EP_API])();
  void *metadata;
  ((void (*)(void **))api[ORT_CREATE_KEY_VALUE_PAIRS])(&metadata);
  ((void (*)(void *, const char *, const char *))api[ORT_ADD_KEY_VALUE_PAIR])(metadata, "pci_bus_id", "0000:01:00.0");
  Status status = ((Status (*)(int, uint32_t, uint32_t, const char *, const void *, void **))ep_api[EP_CREATE_HARDWARE_DEVICE])(
      DEVICE_TYPE_GPU, VENDOR_NVIDIA, 0, "NVIDIA", metadata, &stub);
  if (status) return status;
  library = dlopen(PROVIDER, RTLD_NOW | RTLD_LOCAL);
  if (!library) return ((Status (*)(int, const char *))api[ORT_CREATE_STATUS])(ORT_FAIL, dlerror());
  status = ((CreateFactories)dlsym(library, "CreateEpFactories"))(name, base, logger, factories, most, number);
  if (status) return status;
  theirs = factories[0]->get_supported_devices;
  factories[0]->get_supported_devices = only_the_stub;
  return NULL;
}

Status ReleaseEpFactory(OrtEpFactory *factory) { return ((ReleaseFactory)dlsym(library, "ReleaseEpFactory"))(factory); }
