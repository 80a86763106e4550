// A CUDA device that computes nothing, for running the CUDA build of torch on a machine without a GPU.
//
//     LD_PRELOAD=null_cuda.so python ...
//
// libcudart, cuBLAS, cuSOLVER and NCCL are interposed: memory is reserved address space (80 GB, then "out of memory"),
// kernels are noted by name and not run, collectives and products return at once. So all of torch above the driver is
// the real thing: dispatch, shape and dtype checks, the caching allocator and its peak, streams and events, CUDA graph
// capture with its rules (a call that capture forbids fails here as well), ProcessGroupNCCL's checks.
//
// Limits: values are what the memory happens to hold, mostly 0 (isfinite().all() is False); times mean nothing; cuDNN, cuFFT
// and cuSPARSE are not there; races between streams are not simulated. NULL_CUDA_DEVICES=N shows N devices.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
static std::mutex lock;
static std::atomic<uintptr_t> next_handle{0x1000};  // what the next stream, event or library handle is
static thread_local int device = 0;
static thread_local cudaError_t last = cudaSuccess;
static int devices() {
    static int n = getenv("NULL_CUDA_DEVICES") ? atoi(getenv("NULL_CUDA_DEVICES")) : 1;
    return n;
}
static const size_t TOTAL = 85045878784ull, CONTEXT = 530ull << 20;  // an H100's memory; what a context takes of it
static const int SHARED_MAX = 232448, MULTIPROCESSORS = 132;

struct State {
    std::map<uintptr_t, size_t> device_memory, host_memory;  // begin and size of what is allocated
    size_t used = CONTEXT;
    std::unordered_map<const void*, std::string> names;  // of kernels, by the address that stands for them on the host
    std::map<std::string, long> counts;  // calls by kernel, and waits of the host
    std::vector<std::string> order, faults, notes;  // launches with their sizes; calls that a device would have refused; captures
    bool keep_order = false;
};
static State& s() {
    static State* state = new State;
    return *state;
}

// ---------------------------------------------------------------------------------------------------- capture
enum Kind { KERNEL, COPY, MEMSET, COLLECTIVE, REPLAY, KINDS };
struct Graph {
    long nodes[KINDS] = {};
    std::vector<std::string> order;
};
struct Capture {
    Graph* graph;
    cudaStreamCaptureMode mode;
    unsigned long long id;
};
static std::map<cudaStream_t, Capture*> capturing;
static std::map<cudaEvent_t, Capture*> captured_events;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local Capture* mine = nullptr;  // begun by this thread
static unsigned long long captures = 0;
static Capture* of(cudaStream_t stream) {
    auto it = capturing.find(stream);
    return it == capturing.end() ? nullptr : it->second;
}

static cudaError_t fault(cudaError_t code, const char* what) {
    last = code;
    s().faults.push_back(std::string(what) + ": " + cudaGetErrorName(code));
    if (getenv("NULL_CUDA_VERBOSE")) fprintf(stderr, "null_cuda: %s\n", s().faults.back().c_str());
    return code;
}
// What is unsafe while a stream captures: in this thread (thread_local), in any thread (global), unless relaxed.
static cudaError_t unsafe(const char* what) {
    std::lock_guard<std::mutex> guard(lock);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    if (mine && mine->mode != cudaStreamCaptureModeRelaxed) return fault(cudaErrorStreamCaptureUnsupported, what);
    for (auto& [stream, capture] : capturing)
        if (capture->mode == cudaStreamCaptureModeGlobal) return fault(cudaErrorStreamCaptureUnsupported, what);
    return cudaSuccess;
}
static cudaError_t note(const std::string& name, cudaStream_t stream, const std::string& shape, Kind kind) {
    std::lock_guard<std::mutex> guard(lock);
    Capture* capture = of(stream);
    if (!capture && mine && (stream == nullptr || stream == cudaStreamLegacy) && thread_mode != cudaStreamCaptureModeRelaxed)
        return fault(cudaErrorStreamCaptureImplicit, (name + " on the legacy stream while this thread captures").c_str());
    s().counts[(capture ? "captured " : "") + name]++;
    std::string line = name + " " + shape;
    if (s().keep_order && kind != REPLAY) s().order.push_back(line);
    if (capture) {
        capture->graph->nodes[kind]++;
        capture->graph->order.push_back(line);
    }
    return cudaSuccess;
}
// A wait of the host for the device.
static cudaError_t wait(const char* what) {
    std::lock_guard<std::mutex> guard(lock);
    s().counts[std::string("host waits: ") + what]++;
    return cudaSuccess;
}

API void null_cuda_reset() {
    std::lock_guard<std::mutex> g(lock);
    s().counts.clear();
    s().order.clear();
    s().faults.clear();
    s().notes.clear();
}
API void null_cuda_keep_order(int on) { s().keep_order = on; }
API void null_cuda_note(const char* name, const char* shape, void* stream) { note(name, (cudaStream_t)stream, shape, KERNEL); }
API void null_cuda_dump(const char* path) {
    std::lock_guard<std::mutex> g(lock);
    FILE* f = fopen(path, "w");
    for (auto& [name, calls] : s().counts) fprintf(f, "count\t%ld\t%s\n", calls, name.c_str());
    for (auto& line : s().order) fprintf(f, "order\t%s\n", line.c_str());
    for (auto& line : s().faults) fprintf(f, "fault\t%s\n", line.c_str());
    for (auto& line : s().notes) fprintf(f, "note\t%s\n", line.c_str());
    fclose(f);
}

// ---------------------------------------------------------------------------------------------------- registration
API void** __cudaRegisterFatBinary(void*) {
    static void* handle[64];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    std::lock_guard<std::mutex> g(lock);
    s().names[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
    *kernel = (cudaKernel_t)entry;
    return cudaSuccess;
}
struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    auto c = configurations.back();
    configurations.pop_back();
    *grid = c.grid;
    *block = c.block;
    *shared = c.shared;
    *(cudaStream_t*)stream = c.stream;
    return cudaSuccess;
}
static cudaError_t launch(const void* f, dim3 g, dim3 b, void** arguments, size_t shared, cudaStream_t stream) {
    std::string name = "unknown";
    {
        std::lock_guard<std::mutex> guard(lock);
        auto it = s().names.find(f);
        if (it != s().names.end()) name = it->second;
    }
    char shape[160];
    snprintf(shape, sizeof shape, "grid %u,%u,%u block %u,%u,%u shared %zu", g.x, g.y, g.z, b.x, b.y, b.z, shared);
    if (g.y > 65535 || g.z > 65535 || b.x * b.y * b.z > 1024 || shared > SHARED_MAX)
        return fault(cudaErrorInvalidConfiguration, (name + shape).c_str());
    std::string size = shape;
    if (arguments && name.find("elementwise_kernel") != std::string::npos) size += " elements " + std::to_string(*(int*)arguments[0]);
    return note(name, stream, size, KERNEL);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** arguments, size_t shared, cudaStream_t stream) {
    return launch(f, g, b, arguments, shared, stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** arguments, size_t shared, cudaStream_t stream) {
    return launch(f, g, b, arguments, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** arguments) {
    return launch(f, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t fn, void* data) {
    fn(data);
    return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t fn, void* data, unsigned) {
    fn(stream, cudaSuccess, data);
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > SHARED_MAX
               ? fault(cudaErrorInvalidValue, "cudaFuncSetAttribute")
               : cudaSuccess;
}
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = SHARED_MAX;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}
API cudaError_t cudaLibraryLoadData(cudaLibrary_t* l, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned) {
    *l = (cudaLibrary_t)1;
    return cudaSuccess;
}
API cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
API cudaError_t cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t, const char* name) {
    std::lock_guard<std::mutex> g(lock);
    *k = (cudaKernel_t)strdup(name);
    s().names[*k] = name;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- device
API cudaError_t cudaGetDeviceCount(int* n) {
    *n = devices();
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
    *d = device;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= devices()) return fault(cudaErrorInvalidDevice, "cudaSetDevice");
    device = d;
    return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
    if (auto e = unsafe("cudaDeviceSynchronize")) return e;
    return wait("device");
}
API cudaError_t cudaDriverGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
    auto e = last;
    last = cudaSuccess;
    return e;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* id, int n, int d) {
    snprintf(id, n, "0000:%02x:00.0", d + 1);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->uuid.bytes[0] = 1 + d;
    p->totalGlobalMem = TOTAL;
    p->major = 9;
    p->minor = 0;
    p->multiProcessorCount = MULTIPROCESSORS;
    p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = SHARED_MAX;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 52428800;
    p->memoryBusWidth = 5120;
    p->textureAlignment = 512;
    p->maxBlocksPerMultiProcessor = 32;
    p->reservedSharedMemPerBlock = 1024;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = i < 2 ? 1024 : 64;
        p->maxGridSize[i] = i ? 65535 : 2147483647;
    }
    p->pciBusID = d + 1;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->concurrentManagedAccess = p->cooperativeLaunch = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
    switch (a) {
        case cudaDevAttrMultiProcessorCount: *v = MULTIPROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = SHARED_MAX; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *v = 1024; break;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
        case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
        case cudaDevAttrWarpSize: *v = 32; break;
        case cudaDevAttrL2CacheSize: *v = 52428800; break;
        case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *v = 65535; break;
        case cudaDevAttrClockRate: *v = 1980000; break;
        case cudaDevAttrPciBusId: *v = d + 1; break;
        case cudaDevAttrPciDeviceId:
        case cudaDevAttrPciDomainId: *v = 0; break;
        default: *v = 1;
    }
    return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
    static auto stub = +[]() -> int { return 0; };
    *f = (void*)stub;
    if (r) *r = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
    *p = (void*)symbol;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- memory
API cudaError_t cudaMalloc(void** p, size_t n) {
    if (auto e = unsafe("cudaMalloc")) return e;
    std::lock_guard<std::mutex> g(lock);
    size_t size = (n + (2 << 20) - 1) & ~size_t((2 << 20) - 1);
    if (s().used + size > TOTAL) {
        last = cudaErrorMemoryAllocation;
        return last;
    }
    *p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) {
        last = cudaErrorMemoryAllocation;
        return last;
    }
    madvise(*p, size, MADV_NOHUGEPAGE);
    s().device_memory[(uintptr_t)*p] = size;
    s().used += size;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    if (auto e = unsafe("cudaFree")) return e;
    std::lock_guard<std::mutex> g(lock);
    auto it = s().device_memory.find((uintptr_t)p);
    if (it == s().device_memory.end()) return fault(cudaErrorInvalidValue, "cudaFree");
    munmap(p, it->second);
    s().used -= it->second;
    s().device_memory.erase(it);
    return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    std::lock_guard<std::mutex> g(lock);
    *total = TOTAL;
    *available = TOTAL - s().used;
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    if (auto e = unsafe("cudaHostAlloc")) return e;
    if (posix_memalign(p, 4096, n)) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> g(lock);
    s().host_memory[(uintptr_t)*p] = n;
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
    std::lock_guard<std::mutex> g(lock);
    s().host_memory[(uintptr_t)p] = n;
    return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
    std::lock_guard<std::mutex> g(lock);
    s().host_memory.erase((uintptr_t)p);
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    {
        std::lock_guard<std::mutex> g(lock);
        s().host_memory.erase((uintptr_t)p);
    }
    free(p);
    return cudaSuccess;
}
static bool within(const std::map<uintptr_t, size_t>& m, const void* p) {
    auto it = m.upper_bound((uintptr_t)p);
    return it != m.begin() && (--it, (uintptr_t)p < it->first + it->second);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    std::lock_guard<std::mutex> g(lock);
    bool d = within(s().device_memory, p), h = within(s().host_memory, p);
    a->type = d ? cudaMemoryTypeDevice : h ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = device;
    a->devicePointer = d || h ? (void*)p : nullptr;
    a->hostPointer = h ? (void*)p : nullptr;
    return cudaSuccess;
}
static void move(void* to, const void* from, size_t n) {
    bool d;
    {
        std::lock_guard<std::mutex> g(lock);
        d = within(s().device_memory, to) && within(s().device_memory, from);
    }
    if (n <= (d ? 16u << 20 : 512u << 20)) memmove(to, from, n);  // large copies on the device would only take real memory
}
static const char* direction(cudaMemcpyKind kind) {
    const char* names[] = {"H2H", "H2D", "D2H", "D2D", "default"};
    return names[kind];
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
    if (auto e = note(std::string("memcpy ") + direction(kind), stream, std::to_string(n) + " bytes", COPY)) return e;
    move(to, from, n);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    if (auto e = unsafe("cudaMemcpy")) return e;
    note("memcpy (synchronous)", nullptr, std::to_string(n) + " bytes", COPY);
    wait("copy");
    move(to, from, n);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t) {
    move(to, from, n);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind kind, cudaStream_t stream) {
    return note(std::string("memcpy2D ") + direction(kind), stream, "", COPY);
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemset(void* p, int v, size_t n) {
    if (n <= 16 << 20) memset(p, v, n);
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t stream) {
    if (auto e = note("memset", stream, std::to_string(n) + " bytes", MEMSET)) return e;
    if (n <= 16 << 20) memset(p, v, n);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
    *p = (cudaMemPool_t)1;
    return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
    *(uint64_t*)v = 0;
    return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------- streams, events
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* x, unsigned, int) {
    *x = (cudaStream_t)(next_handle += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* x, unsigned) {
    *x = (cudaStream_t)(next_handle += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* x) {
    *x = (cudaStream_t)(next_handle += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
    *p = 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t x) {
    std::lock_guard<std::mutex> g(lock);
    return of(x) ? fault(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a capturing stream") : cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t x) {
    {
        std::lock_guard<std::mutex> g(lock);
        if (of(x)) return fault(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a capturing stream");
    }
    return wait("stream");
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t x, cudaEvent_t e, unsigned) {
    std::lock_guard<std::mutex> g(lock);
    auto it = captured_events.find(e);
    if (it != captured_events.end() && it->second && !of(x)) capturing[x] = it->second;
    else if ((it == captured_events.end() || !it->second) &&
             of(x)) { /* a dependency on work before the capture: an error unless the event is external */
        s().notes.push_back("a capturing stream waits for an event recorded outside the capture");
    }
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
    *e = (cudaEvent_t)(next_handle += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = (cudaEvent_t)(next_handle += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
    std::lock_guard<std::mutex> g(lock);
    captured_events.erase(e);
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t x) {
    std::lock_guard<std::mutex> g(lock);
    captured_events[e] = of(x);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t x, unsigned) { return cudaEventRecord(e, x); }
API cudaError_t cudaEventQuery(cudaEvent_t e) {
    {
        std::lock_guard<std::mutex> g(lock);
        auto it = captured_events.find(e);
        if (it != captured_events.end() && it->second) return fault(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
    }
    return unsafe("cudaEventQuery");
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (auto x = cudaEventQuery(e)) return x;
    return wait("event");
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    *ms = 1.0f;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- graphs
API cudaError_t cudaStreamBeginCapture(cudaStream_t x, cudaStreamCaptureMode mode) {
    if (!x) return fault(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
    std::lock_guard<std::mutex> g(lock);
    mine = new Capture{new Graph, mode, ++captures};
    capturing[x] = mine;
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t x, cudaGraph_t* graph) {
    std::lock_guard<std::mutex> g(lock);
    Capture* c = of(x);
    if (!c) return fault(cudaErrorIllegalState, "end of no capture");
    *graph = (cudaGraph_t)c->graph;
    for (auto it = capturing.begin(); it != capturing.end();) it = it->second == c ? capturing.erase(it) : std::next(it);
    for (auto& [event, capture] : captured_events)
        if (capture == c) capture = nullptr;
    long* nodes = c->graph->nodes;
    char line[128];
    snprintf(line, sizeof line, "captured graph: %ld kernels, %ld copies, %ld memsets", nodes[KERNEL], nodes[COPY], nodes[MEMSET]);
    s().notes.push_back(line);
    mine = nullptr;
    return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t x, cudaStreamCaptureStatus* status) {
    std::lock_guard<std::mutex> g(lock);
    *status = of(x) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t x, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** deps, const cudaGraphEdgeData** edges, size_t* n) {
    std::lock_guard<std::mutex> g(lock);
    Capture* c = of(x);
    *status = c ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = c ? c->id : 0;
    if (graph) *graph = c ? (cudaGraph_t)c->graph : nullptr;
    if (deps) *deps = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, unsigned) {
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t x, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                              cudaStreamCaptureMode mode) {
    return cudaStreamBeginCapture(x, mode);
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
    *e = (cudaGraphExec_t)g;
    return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t x) {
    if (auto e = note("graph launch", x, "", REPLAY)) return e;
    std::lock_guard<std::mutex> g(lock);
    auto& replayed = ((Graph*)exec)->order;
    if (s().keep_order) s().order.insert(s().order.end(), replayed.begin(), replayed.end());
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) {
    auto* x = (Graph*)graph;
    *n = x->order.size();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------- libraries: every call succeeds
static thread_local cudaStream_t library_stream;
struct Layout {
    uint64_t rows, cols;
    int type;
};
#include "stubs.inc"
