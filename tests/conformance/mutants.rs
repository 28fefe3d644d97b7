//! The list must catch what is planted: each bug in turn, wrapped around a backend, has to fail a case.

use kimi_linear::backend::Backend;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;
use crate::mutated::Mutated;

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// None: the wrapper itself changes nothing.
    None,
    EmbedOffByOne,
    NormEpsilon,
    FirstRowsOnly,
    LastColumnDropped,
    RowsDependOnBatch,
    ConvOffByOne,
    TailOffByOne,
    TailIgnored,
    GatesFlipped,
    GatesClamped,
    SoftplusNaive,
    WriteDoubled,
    DecayMissing,
    DecayLate,
    NormOfKeysEpsilon,
    QueryUnscaled,
    StateTransposed,
    StateIgnored,
    StateStale,
    EmptyPieceSkipped,
    CheckpointAtEnd,
    CheckpointCutsNothing,
    NeighbourWritten,
    BatchDependent,
    Unsteady,
    GatedNormEpsilon,
    GateIsSilu,
    LatentEpsilon,
    AppendOffByOne,
    FutureSeen,
    ScaleWithoutShared,
    NewestUnseen,
    SharedKeyDropped,
    BiasIgnored,
    BiasedWeights,
    GroupsIgnored,
    NotRenormalised,
    GateAndUpSwapped,
    ShardIgnored,
    WeightsIgnored,
    HalvesSwapped,
    SumOverwrites,
    TiesToHigherIds,
    AlwaysFinite,
    NormaliserWithoutMaximum,
    FusedKdaEpsilon,
    FusedMlaEpsilon,
    SharedExpertsForgotten,
    BadTokensAccepted,
    /// Some rows of an operation's output, one in many, are off by four bounds: the norm of the whole tensor hides it.
    OneRowOff,
    /// The greatest element of some rows is off by three bounds: the norm of a wide row hides it.
    OneElementOff,
    /// Some rows of a state, one in many, are off by four bounds.
    OneStateRowOff,
    /// The same for a block's output, in the block alone and not in its composition.
    OneFusedRowOff,
}

/// Each bug with the operations whose cases are to catch it.
const BUGS: [(Bug, &[&str]); 53] = [
    (Bug::EmbedOffByOne, &["embed"]),
    (Bug::NormEpsilon, &["rms_norm"]),
    (Bug::FirstRowsOnly, &["rms_norm"]),
    (Bug::LastColumnDropped, &["linear"]),
    (Bug::RowsDependOnBatch, &["linear"]),
    (Bug::ConvOffByOne, &["short_conv"]),
    (Bug::TailOffByOne, &["short_conv"]),
    (Bug::TailIgnored, &["short_conv"]),
    (Bug::GatesFlipped, &["kda_gates"]),
    (Bug::GatesClamped, &["kda_gates"]),
    (Bug::SoftplusNaive, &["kda_gates"]),
    (Bug::WriteDoubled, &["kda_gates"]),
    (Bug::DecayMissing, KDA),
    (Bug::DecayLate, KDA),
    (Bug::NormOfKeysEpsilon, KDA),
    (Bug::QueryUnscaled, KDA),
    (Bug::StateTransposed, KDA),
    (Bug::StateIgnored, KDA),
    (Bug::StateStale, KDA),
    (Bug::EmptyPieceSkipped, KDA),
    (Bug::CheckpointAtEnd, KDA),
    (Bug::CheckpointCutsNothing, KDA),
    (Bug::NeighbourWritten, KDA),
    (Bug::BatchDependent, KDA),
    (Bug::Unsteady, KDA),
    (Bug::GatedNormEpsilon, &["gated_norm"]),
    (Bug::GateIsSilu, &["gated_norm"]),
    (Bug::LatentEpsilon, &["mla_append"]),
    (Bug::AppendOffByOne, &["mla_append"]),
    (Bug::FutureSeen, &["mla_prefill"]),
    (Bug::ScaleWithoutShared, &["mla_prefill"]),
    (Bug::NewestUnseen, &["mla_decode"]),
    (Bug::SharedKeyDropped, &["mla_decode"]),
    (Bug::BiasIgnored, &["route"]),
    (Bug::BiasedWeights, &["route"]),
    (Bug::GroupsIgnored, &["route"]),
    (Bug::NotRenormalised, &["route"]),
    (Bug::GateAndUpSwapped, &["experts"]),
    (Bug::ShardIgnored, &["experts"]),
    (Bug::WeightsIgnored, &["experts"]),
    (Bug::HalvesSwapped, &["swiglu"]),
    (Bug::SumOverwrites, &["add"]),
    (Bug::TiesToHigherIds, &["select"]),
    (Bug::AlwaysFinite, &["select"]),
    (Bug::NormaliserWithoutMaximum, &["select"]),
    (Bug::FusedKdaEpsilon, &["kda_block"]),
    (Bug::FusedMlaEpsilon, &["mla_block"]),
    (Bug::SharedExpertsForgotten, &["moe_block"]),
    (Bug::BadTokensAccepted, &["refusals"]),
    (Bug::OneRowOff, &["kda_chunk", "kda_step", "mla_prefill"]),
    (
        Bug::OneElementOff,
        &["kda_chunk", "kda_step", "mla_prefill", "linear"],
    ),
    (Bug::OneStateRowOff, KDA),
    (Bug::OneFusedRowOff, &["kda_block", "mla_block"]),
];

const KDA: &[&str] = &["kda_chunk", "kda_step"];

/// One trial a bug and operation; with them one that the wrapper without a bug passes everything.
pub(crate) fn trials(make: Make) -> Vec<Trial> {
    let mut trials = vec![Trial::test("mutant/none", move || {
        let failed: Vec<String> = failures(make, Bug::None, None).collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(format!("the wrapper alone fails {failed:?}").into())
    })];
    for (bug, operations) in BUGS {
        for operation in operations {
            trials.push(Trial::test(
                format!("mutant/{bug:?}/{operation}"),
                move || caught(make, bug, operation),
            ));
        }
    }
    trials
}

fn caught(make: Make, bug: Bug, operation: &str) -> Result<(), Failed> {
    let caught = failures(make, bug, Some(operation)).next();
    println!("{bug:?}: {}", caught.as_deref().unwrap_or("not caught"));
    match caught {
        Some(_) => Ok(()),
        None => Err(format!("no case of {operation} catches {bug:?}").into()),
    }
}

/// The cases that fail on a backend with this bug, lazily.
fn failures(make: Make, bug: Bug, operation: Option<&str>) -> impl Iterator<Item = String> {
    let wanted =
        move |operation: Option<&str>, name: &str| operation.is_none_or(|wanted| wanted == name);
    let cases: Vec<_> = cases()
        .into_iter()
        .filter(|case| wanted(operation, case.operation))
        .collect();
    cases.into_iter().filter_map(move |case| {
        let mut backend: Box<dyn Backend> = Box::new(Mutated::new(make(), bug));
        let outcome = run(&case, &mut *backend, Options::default());
        (matches!(outcome.verdict, Verdict::Failed | Verdict::Lost))
            .then(|| format!("{}: {}", case.name, outcome.detail))
    })
}
