//! `cargo xtask demo`: a meshed application on two nodes, and the proof that it is meshed.

mod proof;
mod scene;
mod table;

use std::{
    io::{IsTerminal, stdout},
    time::Duration,
};

use anyhow::{Result, bail};

use crate::{interrupt, prepare};
use scene::Scene;
use table::Table;

/// How often the live table changes, in a terminal and elsewhere.
const LIVE: Duration = Duration::from_secs(1);
const LOGGED: Duration = Duration::from_secs(10);

/// Shows the demo until Ctrl-C, or with `once` for a few seconds. An error where something of what
/// it proves didn't hold.
pub(crate) fn run(once: bool) -> Result<()> {
    prepare::everything(&["iproute2"], "making namespaces")?;

    println!("Making two nodes, six pods and an agent on each node.");
    let mut scene = Scene::set_up()?;
    let failed = proof::show(&mut scene)?;
    scene.print_guide();
    println!("\nWhy the stranger was refused, as malla explain answers:\n");
    print!("{}", scene.explain_stranger()?);
    show_table(&scene, once)?;
    println!("Removing everything.");
    drop(scene);
    if failed > 0 {
        bail!("{failed} of the claims above did not hold");
    }
    Ok(())
}

/// Shows who talks to whom: once, or until the end is asked for.
fn show_table(scene: &Scene, once: bool) -> Result<()> {
    if once {
        println!("\n{}", Table::of(&scene.metrics()?));
        return Ok(());
    }
    let in_place = stdout().is_terminal();
    let mut lines = 0;
    while !interrupt::requested() {
        let text = format!(
            "{}\n{}\n(Ctrl-C removes everything)\n",
            Table::of(&scene.metrics()?),
            scene.last_votes()
        );
        if in_place && lines > 0 {
            // Up to where the last table began, and clear from there on.
            print!("\x1b[{lines}A\x1b[J");
        }
        print!("\n{text}");
        lines = text.lines().count() + 1;
        let pause = if in_place { LIVE } else { LOGGED };
        let _ = interrupt::wait_for("the next table", pause, || false);
    }
    println!();
    Ok(())
}
