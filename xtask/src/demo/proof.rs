//! What the demo claims, each claim proved in front of the user.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use malla_testbed::Capture;

use super::{
    scene::Scene,
    table::{Row, Table},
};
use crate::interrupt::{self, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

/// How much the wire has to carry before its silence proves something, in bytes.
const ENOUGH: usize = 10 * 1024;

/// Texts that the application sends over and over, and that nothing else contains.
const PLAINTEXT: &[&str] = &[":doughnut:", ":octopus:", ":unicorn:"];

/// Tries a claim. Returns what was seen.
type Proof = fn(&mut Scene) -> Result<String>;

/// Shows the claims one by one. Returns how many did not hold.
pub(super) fn show(scene: &mut Scene) -> Result<usize> {
    let claims: [(&str, Proof); 7] = [
        (
            "The wire between the nodes carries TLS only",
            wire_is_encrypted,
        ),
        (
            "The same search finds plaintext between an unmeshed pair",
            control_is_plain,
        ),
        ("Each end knows the other's identity", identities_are_known),
        (
            "Both replicas behind the Service share its connections",
            service_is_balanced,
        ),
        ("A stranger is refused by a strict pod", stranger_is_refused),
        (
            "A probe of the node reaches the strict pod, and nothing else from there does",
            only_the_probe_passes,
        ),
        (
            "One emoji always fails, the others are counted",
            one_emoji_fails,
        ),
    ];
    let mut failed = 0;
    println!();
    for (claim, prove) in claims {
        let proof = prove(scene);
        interrupt::check()?;
        match proof {
            Ok(seen) => println!("  holds   {claim}: {seen}"),
            Err(error) => {
                failed += 1;
                println!("  FAILED  {claim}: {error:#}");
            }
        }
    }
    Ok(failed)
}

fn wire_is_encrypted(scene: &mut Scene) -> Result<String> {
    let capture = scene.bed.capture_wire(&scene.a, &scene.b)?;
    // Tunnels between the agents open with the first votes: the capture has their handshakes.
    scene.start_bot()?;
    wait_for("handshakes and 10 KiB on the wire", LIMIT, || {
        let tls = capture.tls();
        tls.handshakes > 0 && tls.encrypted >= ENOUGH
    })
    .with_context(|| format!("the bot says:\n{}", scene.last_votes()))?;
    let tls = capture.tls();
    let found = found_in(&capture);
    ensure!(found.is_empty(), "the wire shows {}", found.join(", "));
    if let [(from, to), ..] = tls.other[..] {
        bail!("what went from {from} to {to} is not TLS");
    }
    let missed = capture.missed()?;
    ensure!(missed == 0, "the capture has missed {missed} packets");
    Ok(format!(
        "{} whole handshakes and {} encrypted bytes without a word of the application's",
        tls.handshakes, tls.encrypted
    ))
}

fn control_is_plain(scene: &mut Scene) -> Result<String> {
    let capture = scene.bed.capture_wire(&scene.a, &scene.b)?;
    let question = scene.question(scene.strangers_service(), "LIST");
    scene.a.run(&question)?;
    wait_for("the answer on the wire", LIMIT, || {
        found_in(&capture).len() == PLAINTEXT.len()
    })?;
    Ok(format!("{} and more", PLAINTEXT[0]))
}

fn identities_are_known(scene: &mut Scene) -> Result<String> {
    let named = |name: &str| format!("/ns/emojivoto/sa/{name}");
    let mut seen = String::new();
    let services = [
        ("emoji", "emoji"),
        ("voting-1", "voting"),
        ("voting-2", "voting"),
    ];
    wait_for("both identities of each connection", LIMIT, || {
        let Ok(metrics) = scene.metrics() else {
            return false;
        };
        let table = Table::of(&metrics);
        seen = table.to_string();
        services.iter().all(|(pod, account)| {
            table.row("web", pod).is_some_and(|row| {
                row.is_encrypted
                    && row.client.ends_with(&named("web"))
                    && row.server.ends_with(&named(account))
            })
        })
    })
    .with_context(|| seen.clone())?;
    Ok("web, emoji and voting, by their certificates".to_owned())
}

fn service_is_balanced(scene: &mut Scene) -> Result<String> {
    let mut opened = [0.0; 2];
    wait_for("ten connections to each replica", 2 * LIMIT, || {
        let Ok(metrics) = scene.metrics() else {
            return false;
        };
        let table = Table::of(&metrics);
        opened = ["voting-1", "voting-2"].map(|pod| {
            let row = table.row("web", pod).filter(|row| row.service == "voting");
            row.map_or(0.0, Row::opened)
        });
        opened.iter().all(|opened| *opened >= 10.0)
    })
    .with_context(|| format!("{opened:?} connections"))?;
    Ok(format!("{} and {} connections", opened[0], opened[1]))
}

fn only_the_probe_passes(scene: &mut Scene) -> Result<String> {
    let strict = scene.voting_replica();
    let node = &scene.a;
    let probed = node.caller(strict.ip()).connect(strict);
    probed.with_context(|| format!("the probe of {strict}"))?;
    let question = scene.question(strict, "RESULTS");
    let answered = node.command(
        ["timeout", "2"]
            .into_iter()
            .map(str::to_owned)
            .chain(question),
    );
    let answered = answered.output()?;
    ensure!(
        !answered.status.success(),
        "the node was answered: {}",
        answered.stdout
    );
    Ok(format!(
        "{strict} accepts the node's connection and hears nothing on it"
    ))
}

fn stranger_is_refused(scene: &mut Scene) -> Result<String> {
    // First that nothing else stands in the way: a permissive pod answers the stranger, and the
    // strict one answers a pod of the mesh.
    let permitted = scene.question(scene.emoji_service(), "LIST");
    scene.stranger.run(&permitted).context("a permissive pod")?;
    let question = scene.question(scene.voting_replica(), "RESULTS");
    scene.bot.run(&question).context("a pod of the mesh")?;
    let refused = scene.stranger.command(&question).output()?;
    ensure!(
        !refused.status.success(),
        "it was answered: {}",
        refused.stdout
    );
    let mut said = refused.stderr.lines();
    let cause = said.find(|line| ["reset", "refused"].iter().any(|word| line.contains(word)));
    let cause =
        cause.with_context(|| format!("it was not refused, but failed: {}", refused.stderr))?;
    Ok(cause.trim().to_owned())
}

fn one_emoji_fails(scene: &mut Scene) -> Result<String> {
    wait_for(
        "a vote that failed and one that was counted",
        3 * LIMIT,
        || {
            let votes = scene.votes();
            votes.contains("voted: ") && votes.contains("failed: ")
        },
    )?;
    let votes = scene.votes();
    let failures = votes.lines().filter(|line| line.starts_with("failed: "));
    let others: Vec<&str> = failures
        .filter(|line| !line.contains(PLAINTEXT[0]))
        .collect();
    ensure!(
        others.is_empty(),
        "other votes failed: {}",
        others.join("; ")
    );
    let counted = votes.lines().filter(|line| line.starts_with("voted: "));
    Ok(format!("{} were counted so far", counted.count()))
}

fn found_in(capture: &Capture) -> Vec<&'static str> {
    let found = PLAINTEXT.iter().filter(|text| capture.contains(text));
    found.copied().collect()
}
