//! A frontend and workers as real processes on this machine: started, watched, killed, restarted and stopped.
//!
//! ```no_run
//! # use kimi_linear_cluster::demo::processes::{Cluster, ClusterOptions, Process, Programs, Role};
//! # async fn example() -> Result<(), kimi_linear_cluster::demo::DemoError> {
//! let options = ClusterOptions::new(Programs::beside_this()?, "MODEL", "target/example");
//! let mut cluster = Cluster::start(options).await?;
//! println!("{}", cluster.frontend_url());
//! cluster.kill(Process::worker(Role::Decode, 0)).await?;
//! cluster.restart(Process::worker(Role::Decode, 0)).await?;
//! cluster.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! Each process writes to a log of its own. A process that ends by itself is found by [`Cluster::check`], and every wait has a limit.
//! Dropping a [`Cluster`] kills what still runs.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::commands;
use super::error::{DemoError, Result};
pub use super::parts::{
    ClusterOptions, Discovery, Network, Process, Programs, Role, Site, Threshold,
};
use super::status::StatusClient;

/// Time between two looks at a process.
const POLL: Duration = Duration::from_millis(50);
/// Lines of a log that an error shows.
const TAIL_LINES: usize = 20;
/// Bytes at the end of a log in which these lines are looked for.
const TAIL_BYTES: u64 = 16 << 10;

/// A process that was started.
#[derive(Debug)]
struct Running {
    /// `None` once it was killed or stopped.
    child: Option<Child>,
    log: PathBuf,
}

/// A frontend and workers that run.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    running: BTreeMap<Process, Running>,
    status: StatusClient,
    secret: String,
}

impl Cluster {
    /// Checks the options, starts all processes and waits until requests are answered.
    ///
    /// # Errors
    /// What [`ClusterOptions::check`] finds; a process that ends or does not become ready, with the end of its log. No process is left
    /// then.
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        options.check()?;
        for part in ["logs", "discovery", "etcd"] {
            let folder = options.folder.join(part);
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(DemoError::file("remove", folder)(error));
                }
                _ => {}
            }
            std::fs::create_dir_all(&folder).map_err(DemoError::file("create", &folder))?;
        }
        let status = StatusClient::new(commands::status_url(&options))?;
        let processes = options.processes();
        let mut cluster = Self {
            options,
            running: BTreeMap::new(),
            status,
            secret: format!("{:032x}", rand::random::<u128>()),
        };
        let within = cluster.options.ready_within;
        let since = Instant::now();
        if processes.contains(&Process::Etcd) {
            cluster.spawn(Process::Etcd)?;
            cluster.wait_for(Process::Etcd, since, within).await?;
        }
        for process in processes.iter().filter(|one| **one != Process::Etcd) {
            cluster.spawn(*process)?;
        }
        for process in processes.iter().rev() {
            cluster.wait_for(*process, since, within).await?;
        }
        Ok(cluster)
    }

    /// The base of the API's URLs, without a slash at its end.
    #[must_use]
    pub fn frontend_url(&self) -> String {
        commands::frontend_url(&self.options)
    }

    /// The frontend's view of the cluster.
    #[must_use]
    pub fn status(&self) -> &StatusClient {
        &self.status
    }

    /// The base of a worker's own URLs (`/health`, `/metrics`, `/engine/update/role`).
    #[must_use]
    pub fn worker_url(&self, process: Process) -> String {
        commands::system_url(&self.options, process)
    }

    /// What it was started with.
    #[must_use]
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// The workers.
    #[must_use]
    pub fn workers(&self) -> Vec<Process> {
        let all = self.options.processes().into_iter();
        all.filter(|one| matches!(one, Process::Worker(..)))
            .collect()
    }

    /// The process id of a process that runs.
    #[must_use]
    pub fn id(&self, process: Process) -> Option<u32> {
        self.running.get(&process)?.child.as_ref()?.id()
    }

    /// The log of a process.
    #[must_use]
    pub fn log(&self, process: Process) -> PathBuf {
        log_path(&self.options, process)
    }

    /// Fails if a process has ended that was not killed or stopped.
    ///
    /// # Errors
    /// [`DemoError::Ended`], with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        for (process, running) in &mut self.running {
            let Some(child) = &mut running.child else {
                continue;
            };
            let ended = child.try_wait();
            if let Some(status) = ended.map_err(DemoError::file("read", &running.log))? {
                return Err(DemoError::Ended {
                    process: *process,
                    status,
                    tail: tail(&running.log),
                    log: running.log.clone(),
                });
            }
        }
        Ok(())
    }

    /// Returns when a process has ended that was not killed or stopped.
    pub async fn failure(&mut self) -> DemoError {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Kills a process (SIGKILL) and waits until it is gone. Nothing happens if it does not run.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn kill(&mut self, process: Process) -> Result<()> {
        let Some(running) = self.running.get_mut(&process) else {
            return Ok(());
        };
        if let Some(mut child) = running.child.take() {
            child
                .kill()
                .await
                .map_err(DemoError::file("kill", &running.log))?;
        }
        Ok(())
    }

    /// Stops a process (SIGTERM), or kills it where it takes longer than [`ClusterOptions::stop_within`]. Returns how it ended; `None`
    /// if it did not run, or had to be killed.
    pub async fn stop(&mut self, process: Process) -> Option<ExitStatus> {
        let within = self.options.stop_within;
        let child = self.running.get_mut(&process)?.child.take()?;
        stop(child, within).await
    }

    /// Sends a signal, such as `STOP` or `CONT`, to a process that runs.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn signal(&self, process: Process, name: &str) -> Result<()> {
        match self.id(process) {
            Some(id) => signal(id, name).await,
            None => Ok(()),
        }
    }

    /// Starts a process again that was killed or stopped, and waits until it is ready. Its log goes on.
    ///
    /// # Errors
    /// It ends, or does not become ready in time.
    pub async fn restart(&mut self, process: Process) -> Result<()> {
        self.stop(process).await;
        self.spawn(process)?;
        let within = self.options.ready_within;
        self.wait_for(process, Instant::now(), within).await
    }

    /// Stops everything: first the frontend, which finishes the requests that run, then the workers, then etcd.
    pub async fn shutdown(mut self) {
        let within = self.options.stop_within;
        let mut take = |wanted: &dyn Fn(&Process) -> bool| {
            let all = self.running.iter_mut();
            all.filter(|(process, _)| wanted(process))
                .filter_map(|(_, running)| running.child.take())
                .collect::<Vec<_>>()
        };
        let order = [
            take(&|process| *process == Process::Frontend),
            take(&|process| matches!(process, Process::Worker(..))),
            take(&|_| true),
        ];
        for children in order {
            futures::future::join_all(children.into_iter().map(|child| stop(child, within))).await;
        }
    }

    /// Starts a process, without waiting for it.
    fn spawn(&mut self, process: Process) -> Result<()> {
        let log = log_path(&self.options, process);
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(DemoError::file("write", &log))?;
        let second = file.try_clone().map_err(DemoError::file("write", &log))?;
        let line = commands::line(&self.options, process, &self.secret)?;
        let mut command = self.options.network.command(process.site(), &line.program);
        for (name, _) in std::env::vars_os() {
            // What this process was started with would change what the cluster does.
            if commands::is_ours(&name.to_string_lossy()) {
                command.env_remove(name);
            }
        }
        command
            .args(&line.arguments)
            .envs(line.environment)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(second)
            // Ctrl-C in a terminal goes to this process alone, which stops the others in order.
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn().map_err(|source| DemoError::Start {
            process,
            program: line.program.clone(),
            source,
        })?;
        let child = Some(child);
        self.running.insert(process, Running { child, log });
        Ok(())
    }

    /// Waits until a process is ready and all others live.
    async fn wait_for(&mut self, process: Process, since: Instant, within: Duration) -> Result<()> {
        loop {
            self.check()?;
            let Err(state) = self.ready(process).await else {
                return Ok(());
            };
            if since.elapsed() > within {
                let log = log_path(&self.options, process);
                return Err(DemoError::NotReady {
                    process,
                    within,
                    state,
                    tail: tail(&log),
                    log,
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether a process is ready; otherwise what it lacks.
    async fn ready(&self, process: Process) -> std::result::Result<(), String> {
        let health = match process {
            Process::Etcd => format!("{}/health", commands::etcd_url(&self.options)),
            Process::Frontend => format!("{}/health", self.frontend_url()),
            Process::Worker(..) => format!("{}/health", self.worker_url(process)),
        };
        self.status.is_healthy(&health).await?;
        match process {
            // Workers that were not killed on purpose must be known before a request is routed.
            Process::Frontend => {
                for worker in self.workers() {
                    if self.id(worker).is_some() {
                        self.status.knows(&self.worker_url(worker)).await?;
                    }
                }
                Ok(())
            }
            Process::Worker(..) if self.id(Process::Frontend).is_some() => {
                self.status.knows(&self.worker_url(process)).await
            }
            Process::Worker(..) | Process::Etcd => Ok(()),
        }
    }
}

fn log_path(options: &ClusterOptions, process: Process) -> PathBuf {
    options.folder.join("logs").join(format!("{process}.log"))
}

/// Stops a child; how it ended, or `None` if it had to be killed.
async fn stop(mut child: Child, within: Duration) -> Option<ExitStatus> {
    if let Some(id) = child.id()
        && signal(id, "TERM").await.is_ok()
        && let Ok(Ok(status)) = tokio::time::timeout(within, child.wait()).await
    {
        return Some(status);
    }
    let _ = child.kill().await;
    None
}

/// Sends a signal to a child that was not waited for yet, so that its id is still its own.
async fn signal(id: u32, name: &str) -> Result<()> {
    let command = format!("kill -{name} {id}");
    let output = Command::new("sh").args(["-c", &command]).output().await;
    let failed = |message| DemoError::Command {
        command: command.clone(),
        message,
    };
    let output = output.map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let read = || {
        let mut file = std::fs::File::open(log)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) => return format!("  ({error})"),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let lines = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    match lines {
        [] => "  (it is empty)".into(),
        lines => lines
            .iter()
            .map(|line| format!("  {line}"))
            .collect::<Vec<_>>()
            .join("\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a.log");
        assert!(tail(&log).contains("No such file"));
        std::fs::write(&log, "").unwrap();
        assert_eq!(tail(&log), "  (it is empty)");
        let lines: String = (0..5000).map(|i| format!("line {i}\n")).collect();
        std::fs::write(&log, lines).unwrap();
        let shown = tail(&log);
        assert_eq!(shown.lines().count(), TAIL_LINES);
        assert!(shown.ends_with("  line 4999"), "{shown}");
    }

    #[tokio::test]
    async fn a_process_that_does_not_stop_is_killed() {
        let stubborn = "trap '' TERM; while :; do sleep 0.05; done";
        let mut child = Command::new("sh")
            .args(["-c", stubborn])
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(child.try_wait().unwrap().is_none());
        assert!(stop(child, Duration::from_millis(300)).await.is_none());
        let gentle = Command::new("sleep").arg("60").spawn().unwrap();
        let status = stop(gentle, Duration::from_secs(10)).await.unwrap();
        assert!(!status.success());
    }
}
