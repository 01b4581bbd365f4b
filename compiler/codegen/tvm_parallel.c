/* Runs a kernel's parallel loops on torch's OpenMP pool; linked into every kernel, so that a shared object needs no TVM.

   TVM calls parallel loops through the variable __TVMBackendParallelLaunch, which its own runtime would point at a thread
   pool of its own. Two pools that spin while they wait would fight for the cores with every torch call between two
   kernels, so kernels use libgomp's, which torch has already loaded and sized (torch.set_num_threads, per calling thread). */

#include <stdint.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelEnv;
typedef int (*Task)(int task_id, ParallelEnv* env, void* data);
typedef struct {
  Task task;
  void* data;
  int error;
} Region;

/* libgomp's interface, resolved when the kernel is loaded from the copy that torch brought. */
extern void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
extern int omp_get_max_threads(void);

extern int (*__TVMBackendParallelLaunch)(Task, void*, int) __attribute__((weak));

static void run(void* pointer) {
  Region* region = pointer;
  ParallelEnv env = {0, omp_get_num_threads()};
  int error = region->task(omp_get_thread_num(), &env, region->data);
  if (error) __atomic_store_n(&region->error, error, __ATOMIC_RELAXED);
}

static int launch(Task task, void* data, int num_task) {
  Region region = {task, data, 0};
  GOMP_parallel(run, &region, num_task > 0 ? num_task : omp_get_max_threads(), 0);
  return region.error;
}

__attribute__((constructor)) static void install(void) {
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
}
