//! The nodes, pods and programs of the demo.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use malla_testbed::{Metrics, Node, Pod, PodSpec, Process, Testbed, binary};

use crate::interrupt;

const NAMESPACE: &str = "emojivoto";
const WEB: u16 = 80;
const EMOJI: u16 = 8081;
const VOTING: u16 = 8082;
/// The address of the Service of the voting pods.
const VOTING_SERVICE: &str = "10.96.0.10";

/// Everything that the demo has made. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Scene {
    /// Ended before the bed: the rest of the application would complain about its end.
    bot_process: Option<Process>,
    services: Vec<Process>,
    program: String,
    pub(super) bot: Arc<Pod>,
    pub(super) web: Arc<Pod>,
    pub(super) emoji: Arc<Pod>,
    /// Replicas behind one Service, on a node each.
    pub(super) voting: [Arc<Pod>; 2],
    /// Not part of the mesh.
    pub(super) stranger: Arc<Pod>,
    pub(super) a: Arc<Node>,
    pub(super) b: Arc<Node>,
    pub(super) bed: Testbed,
}

impl Scene {
    /// Makes all of it; only the bot doesn't vote yet.
    pub(super) fn set_up() -> Result<Self> {
        let mut bed = Testbed::new("demo")?;
        let (a, b) = (bed.node("a")?, bed.node("b")?);
        let spec = |name: &str| PodSpec::new(name).namespace(NAMESPACE).account(name);
        let bot = bed.pod(&a, spec("vote-bot"))?;
        let web = bed.pod(&a, spec("web").port(WEB))?;
        let emoji = bed.pod(&b, spec("emoji").port(EMOJI))?;
        let replica = |name: &str| {
            spec(name)
                .account("voting")
                .label("app", "voting")
                .named_port("api", VOTING)
                .probe("tcpSocket: {port: api}")
                .settings("mtls: strict")
        };
        let voting = [
            bed.pod(&a, replica("voting-1"))?,
            bed.pod(&b, replica("voting-2"))?,
        ];
        let service = format!(
            "namespace: {NAMESPACE}\n\
             addresses: [{VOTING_SERVICE}]\n\
             ports: [{{name: api, port: {VOTING}, targetPort: api}}]\n\
             selector: {{app: voting}}"
        );
        bed.service("voting", service)?;
        let stranger = PodSpec::new("stranger").namespace("elsewhere").unmeshed();
        let stranger = bed.pod(&b, stranger)?;
        interrupt::check()?;
        bed.start_agents()?;
        let mut scene = Self {
            bot_process: None,
            services: Vec::new(),
            program: binary("malla-demo")?.display().to_string(),
            bot,
            web,
            emoji,
            voting,
            stranger,
            a,
            b,
            bed,
        };
        scene.startservices()?;
        interrupt::check()?;
        Ok(scene)
    }

    fn startservices(&mut self) -> Result<()> {
        let (emoji, voting) = (self.emoji_service(), Self::voting_service()?);
        let replica = |pod| (pod, VOTING, vec!["voting".to_owned(), VOTING.to_string()]);
        let [one, other] = &self.voting;
        let services = [
            (
                &self.emoji,
                EMOJI,
                vec!["emoji".to_owned(), EMOJI.to_string()],
            ),
            replica(one),
            replica(other),
            // The stranger's is for the control: what the mesh hides must be found there.
            (
                &self.stranger,
                EMOJI,
                vec!["emoji".to_owned(), EMOJI.to_string()],
            ),
            (
                &self.web,
                WEB,
                vec![
                    "web".to_owned(),
                    WEB.to_string(),
                    emoji.to_string(),
                    voting.to_string(),
                ],
            ),
        ];
        for (pod, port, arguments) in services {
            let service = pod.spawn([vec![self.program.clone()], arguments].concat())?;
            self.services.push(service);
            pod.wait_listening(port)?;
        }
        Ok(())
    }

    /// Lets the bot vote from now on.
    pub(super) fn start_bot(&mut self) -> Result<()> {
        let web = SocketAddr::new(self.web.v4().into(), WEB).to_string();
        let bot = self.bot.spawn([self.program.as_str(), "bot", &web])?;
        self.bot_process = Some(bot);
        Ok(())
    }

    pub(super) fn emoji_service(&self) -> SocketAddr {
        SocketAddr::new(self.emoji.v4().into(), EMOJI)
    }

    /// The address of the Service, which no pod has.
    pub(super) fn voting_service() -> Result<SocketAddr> {
        Ok(SocketAddr::new(VOTING_SERVICE.parse()?, VOTING))
    }

    /// The voting pod of the other node than the stranger's.
    pub(super) fn voting_replica(&self) -> SocketAddr {
        SocketAddr::new(self.voting[0].v4().into(), VOTING)
    }

    pub(super) fn strangers_service(&self) -> SocketAddr {
        SocketAddr::new(self.stranger.v4().into(), EMOJI)
    }

    /// The command line that sends one request to a service.
    pub(super) fn question(&self, service: SocketAddr, line: &str) -> [String; 4] {
        let ask = "ask".to_owned();
        [
            self.program.clone(),
            ask,
            service.to_string(),
            line.to_owned(),
        ]
    }

    /// What the bot has said so far.
    pub(super) fn votes(&self) -> String {
        self.bot_process
            .as_ref()
            .map(Process::log)
            .unwrap_or_default()
    }

    /// The bot's last vote that was counted and its last that failed.
    pub(super) fn last_votes(&self) -> String {
        let votes = self.votes();
        let last = |start: &str| {
            let mut lines = votes.lines().rev();
            lines
                .find(|line| line.starts_with(start))
                .unwrap_or_default()
                .to_owned()
        };
        format!("{}\n{}", last("voted"), last("failed"))
    }

    /// The metrics of each agent.
    pub(super) fn metrics(&self) -> Result<[Metrics; 2]> {
        let [a, b] = [&self.a, &self.b].map(|node| self.bed.agent(node).metrics());
        Ok([a?, b?])
    }

    /// What `malla explain` answers for the stranger's connection to a strict pod.
    pub(super) fn explain_stranger(&self) -> Result<String> {
        let (malla, mesh) = (binary("malla")?, self.bed.mesh_path());
        let to = format!("voting-1:{VOTING}");
        let command = [malla.as_os_str(), "explain".as_ref(), "stranger".as_ref()];
        let options = [to.as_ref(), "--config".as_ref(), mesh.as_os_str()];
        let said = self.a.run([command, options].concat())?;
        Ok(said.stdout)
    }

    /// Says where one may look.
    pub(super) fn print_guide(&self) {
        let inside = |node: &Node| format!("nsenter --net={}", node.netns().path().display());
        let (a, wire) = (inside(&self.a), self.a.wire_to(&self.b));
        let [address, _] = self.a.addresses();
        println!(
            "\nWhat to look at, in another terminal:\n  \
             {a} tcpdump -ni {wire} -A        the wire between the nodes\n  \
             {a} curl -s http://{address}:4191/metrics\n  \
             {folder}/        the mesh's configuration and all logs\n\
             The doughnut can't be voted for. Why?",
            folder = self.bed.folder().display()
        );
    }
}
