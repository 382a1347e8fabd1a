// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube/servercfg"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

const portsRetry = time.Second // after the kernel did not take them

// ports has a ConfigMap say what is tunneled beside the ports that the flags name. Until it is known what it says, or that there is none, the
// ports that are pinned, or stored, stay in force.
type ports struct {
	name   string   // of the ConfigMap
	fixed  []uint16 // by the flags
	first  uint16   // redirect port
	source interface {
		Run(context.Context) error
		Status() kube.ConfigMapStatus
	}
	set  func([]uint16) error
	file *portsFile
	log  *slog.Logger

	mu     sync.Mutex // guards what follows
	config servercfg.Config
	kept   bool // config is not usable, what was in force before is
}

// newPorts returns nil where no ConfigMap is to be followed.
func newPorts(client kube.Client, o options, set func([]uint16) error, log *slog.Logger) *ports {
	if o.portsFrom == "" {
		return nil
	}
	p := &ports{name: o.portsFrom, fixed: o.ports, first: o.redirectPort, set: set, file: newPortsFile(o.stateDir), log: log}
	namespace, name, _ := strings.Cut(o.portsFrom, "/")
	p.source = kube.NewConfigMap(kube.ConfigMapConfig{Client: client, Namespace: namespace, Name: name, Changed: p.changed, Log: log})
	return p
}

// changed puts a state of the ConfigMap into force; data is nil if there is none.
func (p *ports) changed(ctx context.Context, data map[string]string) {
	config := servercfg.Parse(data, p.refuse)
	p.mu.Lock()
	p.config, p.kept = config, !config.Usable()
	p.mu.Unlock()
	for _, problem := range config.Problems {
		p.log.Warn("an entry of the ConfigMap needs attention", "configmap", p.name, "key", problem.Key, "entry", problem.Entry, "what", problem.Text, "tunneled", problem.Taken)
	}
	if config.More > 0 {
		p.log.Warn("more entries of the ConfigMap need attention", "configmap", p.name, "number", config.More)
	}
	if !config.Usable() {
		p.log.Error("nothing in the ConfigMap is understood, the ports that were tunneled before stay so", "configmap", p.name)
		return
	}
	if err := p.file.save(config.Ports); err != nil {
		p.log.Error("cannot save the ConfigMap's ports; after a reboot they are not tunneled until the API server answers", "err", err)
	}
	list := p.with(config.Ports)
	for {
		err := p.set(list)
		if err == nil {
			p.log.Info("ports are tunneled as the ConfigMap says", "configmap", p.name, "exists", data != nil, "ports", list)
			return
		}
		p.log.Error("the kernel did not take the ports", "err", err, "retry_in", portsRetry)
		select {
		case <-ctx.Done():
			return
		case <-time.After(portsRetry):
		}
	}
}

// before is what was tunneled before anybody has asked what the ConfigMap says: what is pinned, or, after a reboot, what is stored.
func (p *ports) before(pinned []uint16) []uint16 {
	if len(pinned) > 0 {
		return p.with(pinned)
	}
	stored, err := p.file.load()
	if err != nil {
		p.log.Error("the stored ports are unreadable; those of the flags are tunneled until the API server answers", "err", err)
	}
	return p.with(slices.DeleteFunc(stored, func(port uint16) bool { return p.refuse(port) != "" }))
}

func (p *ports) with(more []uint16) []uint16 {
	list := slices.Concat(p.fixed, more)
	slices.Sort(list)
	return slices.Compact(list)
}

// refuse says why a port cannot be tunneled.
func (p *ports) refuse(port uint16) string {
	if port >= p.first && port-p.first < redirect.Ports {
		return fmt.Sprintf("is one of the redirect ports %d-%d", p.first, int(p.first)+redirect.Ports-1)
	}
	return ""
}

func (p *ports) view() *admin.PortsConfig {
	if p == nil {
		return nil
	}
	s := p.source.Status()
	v := &admin.PortsConfig{ConfigMap: p.name, Complete: s.Complete, Exists: s.Exists, Since: s.Since}
	if s.Err != nil {
		v.Error = s.Err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v.Kept = p.kept
	for _, problem := range p.config.Problems {
		v.Problems = append(v.Problems, problem.String())
	}
	if p.config.More > 0 {
		v.Problems = append(v.Problems, fmt.Sprintf("and %d more", p.config.More))
	}
	return v
}

// metrics name each entry that is wrong. There are few: the parser bounds them.
func (p *ports) metrics() []admin.Metric {
	if p == nil {
		return nil
	}
	s := p.source.Status()
	stale := 0.0
	if !s.Since.IsZero() {
		stale = time.Since(s.Since).Seconds()
	}
	bad := admin.Metric{Name: "edge_tunnel_config_bad_entries", Kind: admin.KindGauge, Labels: []string{"key", "entry"},
		Help: "Entries of the ConfigMap that need attention; those of dnat-ports-pair count, but should be written in another way."}
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := make(map[[2]string]bool)
	for _, problem := range p.config.Problems {
		if labels := [2]string{problem.Key, problem.Entry}; !seen[labels] {
			seen[labels] = true
			bad.Samples = append(bad.Samples, admin.Sample{Labels: labels[:], Value: 1})
		}
	}
	return []admin.Metric{
		admin.Gauge("edge_tunnel_config_complete", "1 once it is known what the ConfigMap says, or that there is none.", oneIf(s.Complete)),
		admin.Gauge("edge_tunnel_config_stale_seconds", "Time since when the ConfigMap cannot be followed; 0 while it can.", stale),
		admin.Gauge("edge_tunnel_config_kept", "1 while nothing in the ConfigMap is understood, so that the ports of before stay in force.", oneIf(p.kept)),
		bad,
	}
}
