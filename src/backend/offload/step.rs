//! A step of device and host: the device's steps, and between them the experts that the host computes.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::check::Demands;
use crate::backend::shared::{On, Traffic};
use crate::backend::{Batch, Capacity, Result, Step, StepOutput, TensorValues, Ticket};

/// A step of the device.
pub(super) struct DeviceStep {
    pub(super) step: Box<dyn Step>,
    /// Whether tokens are drawn in it.
    pub(super) draws: bool,
}

/// Experts on the host.
pub(super) struct HostStep {
    pub(super) step: Box<dyn Step>,
    /// What they read, on the device and on the host: normed rows `[T, d]`, chosen experts `[T, top_k]`, their weights
    /// `[T, top_k]`.
    pub(super) inputs: Vec<(On, On)>,
    /// Their result on the host and on the device, `[T, d]`.
    pub(super) output: (On, On),
    /// What the device runs meanwhile.
    pub(super) beside: Option<DeviceStep>,
}

/// A part of a step, compiled.
pub(super) enum Part {
    Device(DeviceStep),
    Host(HostStep),
}

impl Part {
    /// What is copied from the device and to it.
    pub(super) fn places(&self) -> Vec<&On> {
        match self {
            Self::Device(_) => Vec::new(),
            Self::Host(host) => {
                let inputs = host.inputs.iter().map(|(from, _)| from);
                inputs.chain([&host.output.1]).collect()
            }
        }
    }

    /// Turns timing of its steps on or off.
    fn time(&mut self, on: bool) -> Result<()> {
        match self {
            Self::Device(device) => device.step.time(on),
            Self::Host(host) => {
                host.step.time(on)?;
                match &mut host.beside {
                    Some(beside) => beside.step.time(on),
                    None => Ok(()),
                }
            }
        }
    }
}

pub(super) struct OffloadStep {
    pub(super) traffic: Arc<Traffic>,
    pub(super) capacity: Capacity,
    pub(super) demands: Demands,
    pub(super) parts: Vec<Part>,
    pub(super) names: Vec<&'static str>,
    pub(super) timed: bool,
}

impl Step for OffloadStep {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        let mut parts = self.parts.iter_mut();
        parts.try_for_each(|part| part.time(on))?;
        self.timed = on;
        Ok(())
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.demands.check(&self.capacity, batch)?;
        let mut run = Run {
            batch,
            undrawn: Batch {
                draws: Vec::new(),
                ..batch.clone()
            },
            traffic: &self.traffic,
            timed: self.timed,
            running: Vec::new(),
            output: StepOutput::default(),
        };
        for part in &mut self.parts {
            match part {
                Part::Device(device) => run.device(device)?,
                Part::Host(host) => run.host(host)?,
            }
        }
        run.wait()?;
        Ok(Ticket::ready(Ok(run.output)))
    }
}

/// One submission.
struct Run<'a> {
    batch: &'a Batch,
    /// The batch without its draws, for steps that draw nothing.
    undrawn: Batch,
    traffic: &'a Traffic,
    timed: bool,
    /// The device's steps that were submitted and not awaited yet.
    running: Vec<Ticket<StepOutput>>,
    /// Results so far.
    output: StepOutput,
}

impl Run<'_> {
    /// Submits a step of the device.
    fn device(&mut self, device: &mut DeviceStep) -> Result<()> {
        let batch = if device.draws {
            self.batch
        } else {
            &self.undrawn
        };
        self.running.push(device.step.submit(batch)?);
        Ok(())
    }

    /// Waits for all steps of the device.
    fn wait(&mut self) -> Result<()> {
        let running = std::mem::take(&mut self.running);
        self.finish(running)
    }

    fn finish(&mut self, running: Vec<Ticket<StepOutput>>) -> Result<()> {
        for ticket in running {
            self.output.extend(ticket.wait()?);
        }
        Ok(())
    }

    /// Computes experts on the host while the device runs what is beside them.
    fn host(&mut self, host: &mut HostStep) -> Result<()> {
        let rows = self.batch.tokens.len();
        // The device copies their inputs before it runs what is beside them: the host need not wait for that.
        let inputs = host.inputs.iter();
        let reads: Vec<_> = inputs.map(|(from, _)| from.read(rows)).collect();
        let before = std::mem::take(&mut self.running);
        if let Some(beside) = &mut host.beside {
            self.device(beside)?;
        }
        self.finish(before)?;
        if self.timed {
            // Times are those of operations that run one after the other.
            self.wait()?;
        }
        let started = Instant::now();
        for (read, (_, to)) in reads.into_iter().zip(&host.inputs) {
            let values = read.wait()?;
            self.count(&values);
            to.write(&values)?;
        }
        let mut sending = started.elapsed();
        let found = host.step.submit(&self.undrawn)?.wait()?;
        self.output.extend(found);
        let started = Instant::now();
        let (from, to) = &host.output;
        let values = from.read(rows).wait()?;
        self.count(&values);
        to.write(&values)?;
        sending += started.elapsed();
        if self.timed {
            self.output.add_time("send", sending.as_secs_f64() * 1e3);
        }
        Ok(())
    }

    /// Counts values that pass between device and host.
    fn count(&self, values: &TensorValues) {
        self.traffic.add(match values {
            TensorValues::F32(values) => values.len(),
            TensorValues::Index(values) => values.len(),
        });
    }
}
