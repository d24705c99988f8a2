/* The CUDA runtime without a GPU, preloaded before torch: every call succeeds, and no kernel runs.
 *
 * Device memory is host memory that is reserved but not filled, so 40 GiB cost nothing until they are touched. Copies
 * to and from it are real; those on the device only where they are small, since nothing computes what they move. A
 * launch is counted and forgotten. Whatever makes the host wait on a real GPU is counted as a sync and reported to a
 * hook, with its name. Names that torch imports and that are not here do nothing: see build.py.
 */
#define _GNU_SOURCE
#include "nullgpu.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* --- what is counted --- */

long null_counts[NUM_COUNTERS];
static void (*sync_hook)(const char *);

EXPORT long *null_counters(void) { return null_counts; }
EXPORT void null_on_sync(void (*hook)(const char *)) { sync_hook = hook; }

static void sync_seen(const char *name) {
    null_counts[SYNCS]++;
    if (sync_hook)
        sync_hook(name);
}

/* --- kernels: registered by torch's libraries as they load, launched, never run --- */

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT char __cudaInitModule(void **handle) { return 1; }
EXPORT void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit,
                                   uint3 *thread, uint3 *block, dim3 *block_size, dim3 *grid, int *warp) {}
EXPORT void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                              int constant, int global) {}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

static cudaError_t launched(void) {
    null_counts[KERNELS]++;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                      cudaStream_t stream) {
    return launched();
}
EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                    cudaStream_t stream) {
    return launched();
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launched();
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                               size_t shared, cudaStream_t stream) {
    return launched();
}

/* Compiled <<<...>>> launches push their sizes and pop them again. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed[16];
static __thread int num_pushed;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed[num_pushed].grid = grid;
    pushed[num_pushed].block = block;
    pushed[num_pushed].shared = shared;
    pushed[num_pushed++].stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    num_pushed--;
    *grid = pushed[num_pushed].grid;
    *block = pushed[num_pushed].block;
    *shared = pushed[num_pushed].shared;
    *(void **)stream = pushed[num_pushed].stream;
    return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->ptxVersion = attributes->binaryVersion = card()->capability;
    attributes->maxDynamicSharedSizeBytes = card()->block_shared_memory;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                                 size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function,
                                                                          int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char variables[1 << 16];
    *address = variables;
    return cudaSuccess;
}

/* --- the card --- */

EXPORT cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "no error";
}
EXPORT const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaSuccess";
}

static int attribute(enum cudaDeviceAttr which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
        return 1024;
    case cudaDevAttrMaxBlockDimZ:
        return 64;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxPitch:
        return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
        return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return card()->block_shared_memory;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return card()->shared_memory;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
        return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
        return 65536;
    case cudaDevAttrMultiProcessorCount:
        return card()->multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        return 2048;
    case cudaDevAttrComputeCapabilityMajor:
        return card()->capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
        return card()->capability % 10;
    case cudaDevAttrClockRate: /* kHz, as all rates */
        return 1410000;
    case cudaDevAttrMemoryClockRate:
        return 1215000;
    case cudaDevAttrGlobalMemoryBusWidth:
        return 5120;
    case cudaDevAttrL2CacheSize:
        return 40 << 20;
    case cudaDevAttrTextureAlignment:
        return 512;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
        return 1;
    default:
        return 0;
    }
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, card()->name);
    properties->totalGlobalMem = card_bytes();
    properties->major = card()->capability / 10;
    properties->minor = card()->capability % 10;
    properties->multiProcessorCount = card()->multiprocessors;
    properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = card()->block_shared_memory;
    properties->sharedMemPerMultiprocessor = card()->shared_memory;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    properties->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    properties->textureAlignment = 512;
    properties->unifiedAddressing = properties->concurrentKernels = properties->cooperativeLaunch = 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:00:04.0");
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

/* --- memory --- */

typedef struct {
    char *start;
    size_t size;
    int on_host;
} Block;
static Block blocks[200000];
static int num_blocks;
static size_t used; /* bytes of the device */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t allocate(void **address, size_t size, int on_host) {
    cudaError_t error = cudaErrorMemoryAllocation;
    *address = NULL;
    pthread_mutex_lock(&lock);
    if ((on_host || used + size <= card_bytes()) && num_blocks < (int)(sizeof blocks / sizeof *blocks)) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *start = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (start != MAP_FAILED) {
            blocks[num_blocks++] = (Block){start, size, on_host};
            used += on_host ? 0 : size;
            *address = start;
            error = cudaSuccess;
        }
    }
    pthread_mutex_unlock(&lock);
    return error;
}
static cudaError_t release(void *address) {
    pthread_mutex_lock(&lock);
    for (int i = num_blocks - 1; i >= 0; i--)
        if (address && blocks[i].start == address) {
            used -= blocks[i].on_host ? 0 : blocks[i].size;
            munmap(address, blocks[i].size ? blocks[i].size : 1);
            blocks[i] = blocks[--num_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
/* Where an address lies; cudaMemoryTypeUnregistered for memory of the process itself. */
static enum cudaMemoryType place_of(const void *address) {
    enum cudaMemoryType place = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (int i = num_blocks - 1; i >= 0; i--)
        if ((char *)address >= blocks[i].start && (char *)address < blocks[i].start + blocks[i].size) {
            place = blocks[i].on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
            break;
        }
    pthread_mutex_unlock(&lock);
    return place;
}

EXPORT cudaError_t cudaMalloc(void **address, size_t size) { return allocate(address, size, 0); }
EXPORT cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) {
    return allocate(address, size, 0);
}
EXPORT cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) { return allocate(address, size, 1); }
EXPORT cudaError_t cudaFree(void *address) { return release(address); }
EXPORT cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return release(address); }
EXPORT cudaError_t cudaFreeHost(void *address) { return release(address); }
EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = card_bytes();
    *free_bytes = *total - used - (420u << 20); /* about what a CUDA context takes */
    return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = place_of(address);
    attributes->devicePointer = attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

static void copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault) {
        int to_device = place_of(to) == cudaMemoryTypeDevice, from_device = place_of(from) == cudaMemoryTypeDevice;
        kind = to_device ? (from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                         : (from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
    }
    null_counts[TO_DEVICE] += kind == cudaMemcpyHostToDevice;
    null_counts[TO_HOST] += kind == cudaMemcpyDeviceToHost;
    null_counts[KERNELS] += kind == cudaMemcpyDeviceToDevice; /* a launch to the host */
    if (kind != cudaMemcpyDeviceToDevice || size < 1 << 20)
        memcpy(to, from, size);
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    copy(to, from, size, kind);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    sync_seen("cudaMemcpy");
    copy(to, from, size, kind);
    return cudaSuccess;
}
static cudaError_t fill(void *address, int value, size_t size) {
    null_counts[KERNELS]++;
    if (size < 1 << 20)
        memset(address, value, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    return fill(address, value, size);
}
EXPORT cudaError_t cudaMemset(void *address, int value, size_t size) { return fill(address, value, size); }

/* --- streams and events: an event is the host's time when it was recorded --- */

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return sync_seen("cudaStreamSynchronize"), 0; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { return sync_seen("cudaDeviceSynchronize"), 0; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) { return sync_seen("cudaEventSynchronize"), 0; }

static cudaError_t create(void **handle) {
    *handle = calloc(1, 64);
    return *handle ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) { return create((void **)stream); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return create((void **)stream); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return create((void **)stream);
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                            size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id)
        *id = 0;
    if (count)
        *count = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return create((void **)event); }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return create((void **)event); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(double *)event = now.tv_sec + 1e-9 * now.tv_nsec;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = (float)((*(double *)to - *(double *)from) * 1e3);
    return cudaSuccess;
}

/* --- the driver's functions, by name --- */

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, name) : NULL;
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
