//! Dense products of a prefill's rows by cuBLASLt; rows of single tokens and of outputs have a kernel (`kernels/linear.cu`).
//! The algorithm is selected once per weight shape, not per number of rows, so that a row's sums have the same order for any
//! other rows in the batch; if it is not supported for a number of rows, another one is selected for that number.
//!
//! A plan is cached for each shape and number of rows, so that a product that ran before needs no query of the library: while
//! a stream is captured, some versions of the library fail queries with an error.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Attribute, cudaDataType_t};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::memory::DeviceMemory;
use super::{Library, driver_call, unavailable};
use crate::backend::Result;
use crate::backend::cuda::machine::{Command, Product};
use crate::error::BackendError;

/// Bytes of workspace, as cuBLAS recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Number of rows for which an algorithm is selected: that of a long prompt's segments, which take most of a prefill's time.
const TYPICAL_ROWS: usize = 8192;
/// Maximum number of plans, a few hundred bytes each. A server's segments have many lengths; a dropped plan is created again.
const MOST_PLANS: usize = 4096;

fn said<T>(what: &str, result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|error| BackendError::Driver {
        backend: "cuda",
        what: what.to_owned(),
        reason: format!("cuBLASLt returned {:?}", error.0),
    })
}

/// An object of cuBLASLt, and the function that destroys it.
struct Owned<T: Copy>(T, Destroy<T>);

type Destroy<T> = unsafe fn(T) -> std::result::Result<(), CublasError>;

impl<T: Copy> Owned<T> {
    fn new(
        what: &str,
        made: std::result::Result<T, CublasError>,
        destroy: Destroy<T>,
    ) -> Result<Self> {
        Ok(Self(said(what, made)?, destroy))
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the function matches the object, which is destroyed once.
        let _ = unsafe { (self.1)(self.0) };
    }
}

/// The library's handle and workspace, which all products share.
struct Lt {
    description: Owned<sys::cublasLtMatmulDesc_t>,
    workspace: CudaSlice<u8>,
    handle: Owned<sys::cublasLtHandle_t>,
}

pub(super) struct Products {
    // Before the library, so that plans are dropped first.
    plans: Plans,
    lt: Lt,
}

/// Results of queries.
#[derive(Default)]
struct Plans {
    plans: HashMap<(Shape, usize), Plan>,
    /// The algorithm per weight shape.
    algorithms: HashMap<Shape, sys::cublasLtMatmulAlgo_t>,
}

/// Outputs, columns, and whether the result is f32.
type Shape = (usize, usize, bool);

/// The plan of a product of one shape and number of rows.
struct Plan {
    layouts: Layouts,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The layout of a matrix in column-major order.
type Layout = Owned<sys::cublasLtMatrixLayout_t>;

fn layout(kind: cudaDataType_t, rows: usize, columns: usize) -> Result<Layout> {
    let made = lt::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64);
    Owned::new("a product's layout", made, lt::destroy_matrix_layout)
}

/// `output^T = weight input^T` in column-major order, which is `output = input weight^T` in row-major order.
struct Layouts {
    weight: Layout,
    input: Layout,
    output: Layout,
}

impl Layouts {
    fn new(product: &Product, rows: usize) -> Result<Self> {
        let half = cudaDataType_t::CUDA_R_16BF;
        let result = if product.full {
            cudaDataType_t::CUDA_R_32F
        } else {
            half
        };
        Ok(Self {
            weight: layout(half, product.columns, product.outputs)?,
            input: layout(half, product.columns, rows)?,
            output: layout(result, product.outputs, rows)?,
        })
    }
}

fn shape_of(product: &Product) -> Shape {
    (product.outputs, product.columns, product.full)
}

fn product_of(command: &Command) -> Option<&Product> {
    match command {
        Command::Product(product) => Some(product),
        Command::Launch(_) | Command::Copy { .. } | Command::Collective(_) => None,
    }
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        if !Library::CublasLt.present() {
            return Err(unavailable(
                "NVIDIA's library cuBLASLt (libcublasLt) is not found: install the CUDA toolkit, or put the folder of \
                 PyPI's nvidia-cublas on LD_LIBRARY_PATH",
            ));
        }
        driver_call("its context", stream.context().bind_to_thread())?;
        let handle = Owned::new("cuBLASLt", lt::create_handle(), lt::destroy_handle)?;
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType_t::CUDA_R_32F,
        );
        let made = lt::create_matmul_desc(compute, scale);
        let description = Owned::new("a product", made, lt::destroy_matmul_desc)?;
        let transposed = 1_i32;
        // SAFETY: the description lives, and the attribute is an i32.
        said("a product", unsafe {
            lt::set_matmul_desc_attribute(
                description.0,
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        })?;
        Ok(Self {
            plans: Plans::default(),
            lt: Lt {
                description,
                workspace: driver_call("a workspace", stream.alloc_zeros(WORKSPACE))?,
                handle,
            },
        })
    }

    /// Plans every product of a list that has no plan yet.
    ///
    /// # Errors
    /// An error of cuBLASLt.
    pub(super) fn plan_all(&mut self, commands: &[Command]) -> Result<()> {
        let mut products = commands.iter().filter_map(product_of);
        // All plans of a list must be cached together: none may be created while they are captured.
        if self.plans.plans.len() + products.clone().count() > MOST_PLANS {
            self.plans.plans.clear();
        }
        products.try_for_each(|product| self.plans.plan(&self.lt, product).map(drop))
    }

    /// Enqueues a product. With a plan, the library is not queried.
    ///
    /// # Errors
    /// An error of cuBLASLt.
    pub(super) fn run(&mut self, stream: &Arc<CudaStream>, product: &Product) -> Result<()> {
        let Self { plans, lt: library } = self;
        let Plan { layouts, algorithm } = plans.plan(library, product)?;
        let mut addresses = [0; 3];
        for (address, operand) in addresses.iter_mut().zip(product.operands()?) {
            *address = DeviceMemory::of(stream, operand.buffer())?.address();
        }
        let [input, weight, output] = addresses;
        let (workspace, _record) = library.workspace.device_ptr(stream);
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the operands are as long as the layouts require and are kept by the product's command, which outlives its
        // run; all handles live; one stream has one workspace.
        said("a product", unsafe {
            lt::matmul(
                library.handle.0,
                library.description.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight as *const c_void,
                layouts.weight.0,
                input as *const c_void,
                layouts.input.0,
                output as *const c_void,
                layouts.output.0,
                output as *mut c_void,
                layouts.output.0,
                std::ptr::from_ref(algorithm),
                workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        })
    }
}

impl Plans {
    fn plan(&mut self, lt: &Lt, product: &Product) -> Result<&Plan> {
        let key = (shape_of(product), product.rows);
        if self.plans.len() >= MOST_PLANS && !self.plans.contains_key(&key) {
            self.plans.clear();
        }
        let vacant = match self.plans.entry(key) {
            Entry::Occupied(plan) => return Ok(plan.into_mut()),
            Entry::Vacant(vacant) => vacant,
        };
        let layouts = Layouts::new(product, product.rows)?;
        let usual = match self.algorithms.entry(shape_of(product)) {
            Entry::Occupied(algorithm) => *algorithm.get(),
            Entry::Vacant(vacant) => {
                *vacant.insert(lt.choose(&Layouts::new(product, TYPICAL_ROWS)?)?)
            }
        };
        let algorithm = if lt.does(&usual, &layouts) {
            usual
        } else {
            lt.choose(&layouts)?
        };
        Ok(vacant.insert(Plan { layouts, algorithm }))
    }
}

impl Lt {
    /// Whether an algorithm that was selected for another number of rows supports this one, within the workspace.
    fn does(&self, algorithm: &sys::cublasLtMatmulAlgo_t, layouts: &Layouts) -> bool {
        let mut result = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all handles live; the result is read only if the call has written it.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle.0,
                self.description.0,
                layouts.weight.0,
                layouts.input.0,
                layouts.output.0,
                layouts.output.0,
                std::ptr::from_ref(algorithm),
                result.as_mut_ptr(),
            )
            .result()
            .is_ok_and(|()| result.assume_init().workspaceSize <= WORKSPACE)
        }
    }

    /// The best of the algorithms without split sums: partial sums may be rounded to bf16.
    fn choose(&self, layouts: &Layouts) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;

        let made = lt::create_matmul_pref();
        let preference = Owned::new("a product's preference", made, lt::destroy_matmul_pref)?;
        let (bytes, no_scheme) = (WORKSPACE, 0_u32);
        // SAFETY: all arguments live, and each attribute has its size.
        let found = unsafe {
            let set = |attribute, value: *const c_void, size| {
                lt::set_matmul_pref_attribute(preference.0, attribute, value, size)
            };
            set(
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                set(
                    Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    (&raw const no_scheme).cast(),
                    size_of::<u32>(),
                )
            })
            .and_then(|()| {
                lt::get_matmul_algo_heuristic(
                    self.handle.0,
                    self.description.0,
                    layouts.weight.0,
                    layouts.input.0,
                    layouts.output.0,
                    layouts.output.0,
                    preference.0,
                )
            })
        };
        Ok(said("the choice of a product's algorithm", found)?.algo)
    }
}
