//! The parameters of each kernel, defined once: a struct with named fields that an encoder fills in, and the struct of the same
//! layout that the kernel takes by value.
//!
//! `params!` defines both. `kernels/shared/params_*.h` are generated from these files (`KIMI_BLESS=1 cargo test --lib layout`);
//! a test compares them. Kernels of one operation that run over the same buffers have one struct.

mod experts;
mod kda;
mod mla;
mod rows;
mod trace;

use std::sync::Arc;

pub(super) use self::experts::{
    ExpertsCombine, ExpertsFewIn, ExpertsFewOut, ExpertsGroup, ExpertsManyIn, ExpertsManyOut, Route,
};
pub(super) use self::kda::{
    GatedNorm, KdaDecode, KdaGates, KdaPrepare, KdaPrepareFused, KdaScan, KdaSplits, KdaStep,
    ShortConv,
};
pub(super) use self::mla::{MlaAppend, MlaDecode, MlaPrefill};
pub(super) use self::rows::{
    Add, AddNorm, Convert, Embed, Fill, Linear, LinearFew, PRODUCTS, RmsNorm, Sample, Select,
    Swiglu,
};
pub(super) use self::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use super::machine::{Buffer, fitting};
use crate::backend::Result;
use crate::error::BackendError;

/// A pointer to the beginning of a buffer.
type Pointer<'a> = &'a Arc<Buffer>;
/// The same, or a null pointer.
type Nullable<'a> = Option<&'a Arc<Buffer>>;

/// One value of a struct of parameters.
#[derive(Clone, Debug)]
pub(super) enum Argument {
    /// A pointer to the beginning of a buffer.
    Buffer(Arc<Buffer>),
    /// A null pointer.
    Null,
    /// A `u32`.
    Word(u32),
    /// A `u32` that is a size or a count: the launch fails if it exceeds 32 bits.
    Size(usize),
    /// A `u64`.
    Long(u64),
    /// An `f32`.
    Number(f32),
}

impl Argument {
    /// Its bits; `address` returns the address of a buffer.
    fn bits(&self, name: &str, address: impl Fn(&Buffer) -> Result<u64>) -> Result<u64> {
        Ok(match self {
            Self::Buffer(buffer) => address(buffer)?,
            Self::Null => 0,
            Self::Word(value) => u64::from(*value),
            Self::Size(value) => u64::from(fitting(name, *value as u64)?),
            Self::Long(value) => *value,
            Self::Number(value) => u64::from(value.to_bits()),
        })
    }
}

impl PartialEq for Argument {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Buffer(one), Self::Buffer(other)) => Arc::ptr_eq(one, other),
            (Self::Null, Self::Null) => true,
            (Self::Word(one), Self::Word(other)) => one == other,
            (Self::Size(one), Self::Size(other)) => one == other,
            (Self::Long(one), Self::Long(other)) => one == other,
            (Self::Number(one), Self::Number(other)) => one == other,
            _ => false,
        }
    }
}

/// A type of fields.
trait Parameter {
    /// Its type in the kernels; a pointer's is part of the definition.
    #[cfg(test)]
    const C: &'static str = "";
    /// Bytes of one value, which is aligned to as many.
    const BYTES: usize;
    /// Number of values.
    const COUNT: usize = 1;

    /// Appends its values.
    fn put(&self, to: &mut Vec<Argument>);
}

macro_rules! parameters {
    ($($kind:ty, $bytes:literal, $c:literal: |$value:ident| $argument:expr;)*) => {
        $(impl Parameter for $kind {
            #[cfg(test)]
            const C: &'static str = $c;
            const BYTES: usize = $bytes;

            fn put(&self, to: &mut Vec<Argument>) {
                let $value = *self;
                to.push($argument);
            }
        })*
    };
}
parameters! {
    Pointer<'_>, 8, "": |buffer| Argument::Buffer(Arc::clone(buffer));
    Nullable<'_>, 8, "": |buffer| buffer.map_or(Argument::Null, |some| Argument::Buffer(Arc::clone(some)));
    u32, 4, "u32": |word| Argument::Word(word);
    bool, 4, "u32": |yes| Argument::Word(yes.into());
    usize, 4, "u32": |size| Argument::Size(size);
    u64, 8, "u64": |long| Argument::Long(long);
    f32, 4, "float": |number| Argument::Number(number);
}

impl<T: Parameter, const N: usize> Parameter for [T; N] {
    #[cfg(test)]
    const C: &'static str = T::C;
    const BYTES: usize = T::BYTES;
    const COUNT: usize = N;

    fn put(&self, to: &mut Vec<Argument>) {
        self.iter().for_each(|value| value.put(to));
    }
}

/// A field of a struct of parameters.
#[derive(Debug)]
struct Field {
    name: &'static str,
    /// Bytes of one value.
    bytes: usize,
    /// Number of values; 1 unless it is an array.
    count: usize,
    /// The type of a value in the kernels.
    #[cfg(test)]
    c: &'static str,
    /// Shape, dtype, unit.
    #[cfg(test)]
    meaning: &'static str,
}

/// A struct of parameters.
#[derive(Debug)]
pub(super) struct Definition {
    /// The entry points that take it.
    entries: &'static [&'static str],
    fields: &'static [Field],
    #[cfg(test)]
    name: &'static str,
    #[cfg(test)]
    about: &'static [&'static str],
}

impl Definition {
    /// Each value's field and its offset in bytes, by the rules of `repr(C)`.
    fn places(&self) -> impl Iterator<Item = (&'static Field, usize)> {
        let values = self.fields.iter();
        let values = values.flat_map(|field| std::iter::repeat_n(field, field.count));
        values.scan(0_usize, |end, field| {
            let at = end.next_multiple_of(field.bytes);
            *end = at + field.bytes;
            Some((field, at))
        })
    }
}

/// A struct of parameters that is filled in.
pub(super) trait Params {
    /// Its fields and its entry points.
    const DEFINITION: &'static Definition;

    /// Its values, in the order of the fields.
    fn values(&self) -> Vec<Argument>;
}

/// Defines structs of parameters: `Name["entry", ..] { field: type = "meaning", .. }`. Types of values in the kernels follow from
/// those here, but a pointer's, which is written after `as`.
macro_rules! params {
    ($($(#[doc = $about:literal])* $name:ident[$($entry:literal),+ $(,)?] {
        $($field:ident: $kind:ty $(as $c:literal)? = $meaning:literal),* $(,)?
    })*) => {
        $(
            $(#[doc = $about])*
            #[derive(Clone, Copy)]
            pub(in crate::backend::cuda) struct $name<'a> {
                $(#[doc = concat!("`", $meaning, "`")] pub(in crate::backend::cuda) $field: $kind),*
            }

            impl<'a> $crate::backend::cuda::params::Params for $name<'a> {
                const DEFINITION: &'static $crate::backend::cuda::params::Definition =
                    &$crate::backend::cuda::params::Definition {
                        entries: &[$($entry),+],
                        fields: &[$($crate::backend::cuda::params::Field {
                            name: stringify!($field),
                            bytes: <$kind as $crate::backend::cuda::params::Parameter>::BYTES,
                            count: <$kind as $crate::backend::cuda::params::Parameter>::COUNT,
                            #[cfg(test)]
                            c: [$($c,)? <$kind as $crate::backend::cuda::params::Parameter>::C][0],
                            #[cfg(test)]
                            meaning: $meaning,
                        }),*],
                        #[cfg(test)]
                        name: stringify!($name),
                        #[cfg(test)]
                        about: &[$($about),*],
                    };

                fn values(&self) -> Vec<$crate::backend::cuda::params::Argument> {
                    let mut values = Vec::new();
                    $($crate::backend::cuda::params::Parameter::put(&self.$field, &mut values);)*
                    values
                }
            }
        )*

        /// The structs of this file.
        #[cfg(test)]
        pub(super) const ALL: &[&$crate::backend::cuda::params::Definition] =
            &[$(<$name<'_> as $crate::backend::cuda::params::Params>::DEFINITION),*];
    };
}
use params;

/// The parameters of a launch. Launches of one step share them and differ in their grids, so that graphs are found without a
/// look at any value.
#[derive(Clone, Debug)]
pub(super) struct Arguments {
    of: &'static Definition,
    values: Arc<[Argument]>,
}

impl Arguments {
    /// Those of a struct that is filled in.
    pub(super) fn new<P: Params>(params: &P) -> Self {
        Self {
            of: P::DEFINITION,
            values: params.values().into(),
        }
    }

    /// The buffers that they point to.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &Arc<Buffer>> {
        self.values.iter().filter_map(|value| match value {
            Argument::Buffer(buffer) => Some(buffer),
            _ => None,
        })
    }

    /// The struct as this kernel reads it, in words of eight bytes: its alignment is that of a pointer.
    ///
    /// # Errors
    /// Those of `address`, a size beyond 32 bits, a kernel that takes another struct.
    pub(super) fn words(
        &self,
        kernel: &'static str,
        address: impl Fn(&Buffer) -> Result<u64>,
    ) -> Result<Vec<u64>> {
        if !self.of.entries.contains(&kernel) {
            return Err(BackendError::Shape {
                operation: kernel,
                what: "parameters",
                expected: "its own".to_owned(),
                found: format!("those of {}", self.of.entries.join(", ")),
            });
        }
        let mut words = Vec::new();
        for (value, (field, at)) in self.values.iter().zip(self.of.places()) {
            words.resize(at / 8 + 1, 0);
            words[at / 8] |= value.bits(field.name, &address)? << (8 * (at % 8));
        }
        Ok(words)
    }
}

impl PartialEq for Arguments {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.values, &other.values) || self.values == other.values
    }
}

#[cfg(test)]
mod tests;
