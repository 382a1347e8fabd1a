// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"log/slog"

	"github.com/spf13/pflag"
)

// Log is what the logging flags say. The zero value is text at level info.
type Log struct {
	Level slog.Level
	JSON  bool
}

// LogVar adds --log-level and --log-format.
func LogVar(fs *pflag.FlagSet, p *Log) {
	ChoiceVar(fs, &p.Level, "log-level", []Choice[slog.Level]{
		{"debug", slog.LevelDebug}, {"info", slog.LevelInfo}, {"warn", slog.LevelWarn}, {"error", slog.LevelError},
	}, "Log what is at least this important; debug adds the start of each connection.")
	ChoiceVar(fs, &p.JSON, "log-format", []Choice[bool]{{"text", false}, {"json", true}},
		"One line of key=value pairs, or one JSON object, for each event.")
}

// Logger returns a logger that writes to w.
func (l Log) Logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: l.Level}
	if l.JSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
