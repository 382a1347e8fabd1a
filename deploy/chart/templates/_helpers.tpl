{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/* No instance: a node has one kernel, so a cluster has one of us. */}}
{{- define "selector" -}}
app.kubernetes.io/name: edge-tunnel
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* What all pods have in common; values are those of the component. */}}
{{- define "pod" -}}
serviceAccountName: tunnel-{{ .component }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .root.Values.priorityClass.name }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The last flags, which win. */}}
{{- define "lastArgs" -}}
- --log-format=json
- --log-level={{ .logLevel }}
{{- range .extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "linux" -}}
- {key: kubernetes.io/os, operator: In, values: [linux]}
- {key: type, operator: NotIn, values: [virtual-kubelet]} # no machines
{{- end }}

{{/* Edge nodes that are tunneled: one term for each label, because terms are alternatives. NotIn holds for a node without the label, too. */}}
{{- define "edgeNodes" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
    {{- range .Values.edge.labels }}
    {{- $label := splitn "=" 2 . }}
      - matchExpressions:
          {{- include "linux" $ | nindent 10 }}
          - {key: {{ $label._0 }}, operator: In, values: [{{ $label._1 | quote }}]}
          {{- range $.Values.edge.modeLabels }}
          - {key: {{ . }}, operator: NotIn, values: [private, improved]}
          {{- end }}
    {{- end }}
{{- end }}

{{/* All that are no edge nodes, of whatever mode. */}}
{{- define "cloudNodes" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          {{- include "linux" $ | nindent 10 }}
          {{- range .Values.edge.labels }}
          {{- $label := splitn "=" 2 . }}
          - {key: {{ $label._0 }}, operator: NotIn, values: [{{ $label._1 | quote }}]}
          {{- end }}
{{- end }}

{{/* The CA bundle. The key is named, so that a pod does not start before the controller has filled the ConfigMap: a file that comes later is seen
     by the kubelet a minute later. */}}
{{- define "caVolume" -}}
- {name: ca, configMap: {name: edge-tunnel-ca, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}

{{/* What whoever has metrics over TLS needs; for a ClusterRole. */}}
{{- define "reviews" -}}
{{- if .Values.metrics }}
  # create: to ask who wants the metrics.
  - apiGroups: [authentication.k8s.io]
    resources: [tokenreviews]
    verbs: [create]
  # create: and whether that one may have them.
  - apiGroups: [authorization.k8s.io]
    resources: [subjectaccessreviews]
    verbs: [create]
{{- end }}
{{- end }}

{{/* The binding of a role to an account: kind is Role or ClusterRole, namespace that of the role. */}}
{{- define "binding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: edge-tunnel-{{ .component }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels: {{- include "labels" . | nindent 4 }}
  {{- with .annotations }}
  annotations: {{- . | nindent 4 }}
  {{- end }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: {{ .kind }}, name: edge-tunnel-{{ .component }}}
subjects: [{kind: ServiceAccount, name: tunnel-{{ .component }}, namespace: {{ .root.Release.Namespace }}}]
{{- end }}
